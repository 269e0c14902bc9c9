"""From Score and Embed requests to what the engine reads: checked, encoded, and fitted into the model's context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.chassis.validation import check_input
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.front.plans import PRIORITIES, check_model, check_tenant, longest_sequence
from meshlm.worker.front.prompts import Prompts
from meshlm.worker.messages import Limits, ModelFacts, Sampling, Submit

MAX_CONTINUATIONS = 16
MAX_INPUTS = 64
MAX_PIECES = 64

Pool = Literal["mean", "last"]
_POOLS: dict[int, Pool] = {
    worker_pb2.POOLING_UNSPECIFIED: "mean",
    worker_pb2.POOLING_MEAN: "mean",
    worker_pb2.POOLING_LAST: "last",
}


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """Texts to read, each in a sequence of its own. Exactly one of `score_from` and `pool` is set."""

    texts: Sequence[list[int]]
    score_from: int | None = None  # the first token of each text that is scored
    pool: Pool | None = None
    priority: int
    cache_salt: bytes
    tenant: str
    deadline: float | None  # seconds, `time.monotonic`

    @property
    def shares_prefix(self) -> bool:
        """Whether all texts begin with the same input, so that reading one first saves the others that work."""
        return self.score_from is not None and len(self.texts) > 1

    def submit(self, identifier: str, index: int) -> Submit:
        """The sequence of one text."""
        return Submit(
            id=identifier,
            prompt=self.texts[index],
            sampling=Sampling(temperature=0),
            limits=Limits(max_tokens=1, deadline=self.deadline),
            priority=self.priority,
            admitted=index > 0,
            cache_salt=self.cache_salt,
            tenant=self.tenant,
            arrival=time.monotonic(),
            score_from=self.score_from,
            pool=self.pool,
        )


@dataclass(frozen=True)
class ReadLimits:
    model: str  # name of the model that is served
    tokens: int  # most tokens of all texts of a request


async def plan_score(
    request: worker_pb2.ScoreRequest, prompts: Prompts, facts: ModelFacts, limits: ReadLimits, seconds: float | None
) -> ReadPlan:
    """`seconds`: until the caller's deadline. Raises MeshError: REQUEST_INVALID, MODEL_UNKNOWN, CONTEXT_TOO_LONG."""
    _check_common(request, limits)
    if not request.pieces:
        check_input(request.input, "input")
    else:
        _check_pieces(request)
    if len(request.continuations) > MAX_CONTINUATIONS:
        raise invalid("continuations", f"more than {MAX_CONTINUATIONS}")
    if request.continuations and request.HasField("from_token"):
        raise invalid("from_token", "has no meaning with continuations")
    if request.pieces:
        read = await prompts.encode_pieces(request.pieces, vocab_size=facts.vocab_size, path="pieces")
    else:
        read = await prompts.encode(
            request.input, control_tokens=request.allow_control_tokens, vocab_size=facts.vocab_size, path="input"
        )
    if request.continuations:
        texts = [read + ids for ids in await _continuations(request, prompts, facts)]
        score_from = len(read)
    else:
        texts, score_from = [read], request.from_token if request.HasField("from_token") else 1
        if not 1 <= score_from < len(read):
            raise invalid("from_token", f"must be in [1, {len(read)}), for the input has {len(read)} tokens")
    _check_lengths(texts, facts, limits)
    return _plan(request, texts, seconds, score_from=score_from)


async def plan_embed(
    request: worker_pb2.EmbedRequest, prompts: Prompts, facts: ModelFacts, limits: ReadLimits, seconds: float | None
) -> ReadPlan:
    """`seconds`: until the caller's deadline. Raises MeshError: REQUEST_INVALID, MODEL_UNKNOWN, CONTEXT_TOO_LONG."""
    _check_common(request, limits)
    if not 1 <= len(request.inputs) <= MAX_INPUTS:
        raise invalid("inputs", f"1 to {MAX_INPUTS} are required")
    if request.pooling not in _POOLS:
        raise invalid("pooling", "not one of its values")
    texts = []
    for number, source in enumerate(request.inputs):
        path = f"inputs[{number}]"
        check_input(source, path)
        control = request.allow_control_tokens
        texts.append(await prompts.encode(source, control_tokens=control, vocab_size=facts.vocab_size, path=path))
    _check_lengths(texts, facts, limits)
    return _plan(request, texts, seconds, pool=_POOLS[request.pooling])


async def _continuations(request: worker_pb2.ScoreRequest, prompts: Prompts, facts: ModelFacts) -> list[list[int]]:
    encoded = []
    for number, source in enumerate(request.continuations):
        path = f"continuations[{number}]"
        if source.WhichOneof("continuation") is None:
            raise invalid(path, "one of text, token_ids or end_of_turn is required")
        encoded.append(await prompts.encode_continuation(source, vocab_size=facts.vocab_size, path=path))
    return encoded


def _check_pieces(request: worker_pb2.ScoreRequest) -> None:
    if request.HasField("input"):
        raise invalid("input", "has no meaning with pieces")
    if len(request.pieces) > MAX_PIECES:
        raise invalid("pieces", f"more than {MAX_PIECES}")
    for number, piece in enumerate(request.pieces):
        if not piece.text:
            raise invalid(f"pieces[{number}].text", "must not be empty")


def _check_common(request: worker_pb2.ScoreRequest | worker_pb2.EmbedRequest, limits: ReadLimits) -> None:
    check_model(request.model, limits.model)
    check_tenant(request.tenant)
    if request.priority not in pb.Priority.values():
        raise invalid("priority", "not one of its values")


def _check_lengths(texts: Sequence[list[int]], facts: ModelFacts, limits: ReadLimits) -> None:
    longest, total = longest_sequence(facts), sum(map(len, texts))
    most = max(map(len, texts))
    if most > longest:
        raise MeshError(
            Reason.CONTEXT_TOO_LONG,
            f"a text has {most} tokens; {longest} fit",
            metadata={"prompt_tokens": str(most), "max_context": str(longest)},
        )
    if total > limits.tokens:
        raise MeshError(
            Reason.CONTEXT_TOO_LONG,
            f"the texts have {total} tokens together; {limits.tokens} are read at once",
            metadata={"prompt_tokens": str(total), "max_tokens": str(limits.tokens)},
        )


def _plan(
    request: worker_pb2.ScoreRequest | worker_pb2.EmbedRequest,
    texts: Sequence[list[int]],
    seconds: float | None,
    *,
    score_from: int | None = None,
    pool: Pool | None = None,
) -> ReadPlan:
    return ReadPlan(
        texts=texts,
        score_from=score_from,
        pool=pool,
        priority=PRIORITIES[request.priority],
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        deadline=None if seconds is None else time.monotonic() + seconds,
    )
