"""A caller whose connection broke comes back: what its stream had made waits for it in the shared store for a while.

gRPC cannot tell a lost connection from a cancel, so nothing is computed for a caller who is away: its tokens are kept,
and made on from when it returns, at whatever router.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from array import array
from dataclasses import asdict, dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.chassis.validation import is_deterministic
from meshlm.router.streams.config import StreamsConfig
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb

log = structlog.get_logger()

# A caller may be back before its router has noticed that it was gone, seconds.
_PATIENCE = 2.0
_ASK_AGAIN_SECONDS = 0.1
# A stream that ended so may be resumed: its caller went away, or the mesh failed it.
_BROKEN = frozenset(
    {"cancelled", Reason.ENGINE_LOST, Reason.NO_REPLICA, Reason.DRAINING, Reason.OVERLOADED, Reason.GUARD_UNAVAILABLE}
)


@dataclass(frozen=True)
class _Kept:
    """A broken stream."""

    request: str  # digest of what was asked
    model: str  # that its name led to
    sampling: str  # as the mesh filled it in; the message, base64
    seed: int | None
    revision: str
    tokens: list[list[int]]  # of each choice
    sent: list[int]  # tokens of each that are billed


class Returns:
    """Broken streams, kept by tenant, key and request id."""

    def __init__(self, redis: Redis | None, config: StreamsConfig) -> None:
        self._redis = redis
        self._ttl_ms = round(config.resumable_seconds * 1000)

    async def keep(self, work: Work) -> None:
        """A request is over: if it broke and may be resumed, its tokens wait. A store that fails costs only that."""
        if not work.resumable or work.complete or work.outcome not in _BROKEN:
            return
        if not all(choice.known for choice in work.progress) or not any(choice.made for choice in work.progress):
            return
        if work.choice is None:
            return  # nobody was found to go on with what it resumes: that is kept still, under its own id
        sent = [max(choice.paid_to, work.ends.get(index, 0)) for index, choice in enumerate(work.progress)]
        tokens = [list(choice.made) for choice in work.progress]
        sampling = base64.b64encode(work.generation.sampling.SerializeToString()).decode()
        choice = work.choice
        kept = _Kept(work.asked, choice.model, sampling, work.seed, choice.revision, tokens, sent)
        if self._redis is not None:
            try:
                await self._redis.set(_name(work, work.request_id), json.dumps(asdict(kept)), px=self._ttl_ms)
            except (RedisError, OSError, TimeoutError) as error:
                log.warning("a broken stream could not be kept", error=type(error).__name__)

    async def find(self, work: Work) -> None:
        """For a request that resumes another: its tokens, its seed, and what of it is paid for.

        Without a record the request must be deterministic; then it is computed, and billed, anew. Raises MeshError
        REQUEST_INVALID, or NO_REPLICA where the store does not answer.
        """
        if work.resumable or work.resume_of:
            work.asked = _digest(work.generation)  # before the mesh fills in more
        if not work.resume_of:
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + min(_PATIENCE, work.seconds_left())
        while (found := await self._read(work)) is None and loop.time() < until:  # noqa: ASYNC110  it is in the store
            await asyncio.sleep(_ASK_AGAIN_SECONDS)
        if found is not None and _fits(work, found):
            work.generation.model = found.model
            work.generation.sampling.ParseFromString(base64.b64decode(found.sampling))
            for progress, tokens, sent in zip(work.progress, found.tokens, found.sent, strict=True):
                progress.made, progress.paid_to = array("I", tokens), sent
            work.drawn = found.seed if found.seed is not None else work.drawn
            work.revision, work.prompt_paid = found.revision, True
        elif not is_deterministic(work.generation.sampling):
            raise invalid("resume_of", "no stream of this id and request can be resumed, and a draw has no seed")

    async def _read(self, work: Work) -> _Kept | None:
        if self._redis is None:
            return None
        try:
            reading = asyncio.ensure_future(self._redis.get(_name(work, work.resume_of)))
            value = await asyncio.shield(reading)  # the store's client may swallow a cancel
        except (RedisError, OSError, TimeoutError):
            if is_deterministic(work.generation.sampling):
                return None
            raise MeshError(Reason.NO_REPLICA, "the store of broken streams does not answer", retry_after=1.0) from None
        return None if value is None else _Kept(**json.loads(value))


def _fits(work: Work, found: _Kept) -> bool:
    """Whether it is the same request, but for what a caller was told and may name now."""
    asked, kept = work.generation.sampling, pb.Sampling.FromString(base64.b64decode(found.sampling))
    for name in ("temperature", "top_p"):
        if asked.HasField(name) and getattr(asked, name) != getattr(kept, name):
            return False
    same_seed = not asked.HasField("seed") or asked.seed == found.seed
    if not same_seed or found.request != work.asked:
        return False
    return all(c.resume_from <= len(tokens) for c, tokens in zip(work.progress, found.tokens, strict=True))


def _name(work: Work, request_id: str) -> str:
    return f"meshlm:{{{work.key.tenant}}}:stream:{work.key.id}:{request_id}"


def _digest(generation: pb.Generation) -> str:
    """Of all that was asked but what the router may have chosen: a caller who was told may name it now."""
    asked = pb.Generation()
    asked.CopyFrom(generation)
    for name in ("seed", "temperature", "top_p"):
        asked.sampling.ClearField(name)
    asked.ClearField("model")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()
