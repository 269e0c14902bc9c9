"""One request on its way through the pipeline: what is known of it so far, and what came of it."""

from __future__ import annotations

import hashlib
import secrets
import time
from array import array
from dataclasses import dataclass, field, replace

from meshlm.chassis.calls import REQUEST_ID
from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.chassis.prefixes import TextPrefix
from meshlm.chassis.validation import check_generation, is_deterministic, keeps_part
from meshlm.router.accounts.limits import Terms, Usage
from meshlm.router.accounts.reservation import Reservation
from meshlm.router.answers import Lookup
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.router.measure import Measure, measure
from meshlm.router.replicas.choosing import Choice, Wanted
from meshlm.router.replicas.replica import Replica
from meshlm.router.replicas.residency import ANYWHERE, Regions
from meshlm.router.risk.assessment import Assessment
from meshlm.router.routing.routes import Decision, Query
from meshlm.router.streams.progress import Progress
from meshlm.router.wording import Wording, word
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2, worker_pb2

# Seconds that a request may have been on its way: its deadline comes as the time that was left when it was sent.
_ON_THE_WAY = 0.05
_PRIORITIES = {
    "critical": pb.PRIORITY_CRITICAL,
    "interactive": pb.PRIORITY_INTERACTIVE,
    "standard": pb.PRIORITY_STANDARD,
    "batch": pb.PRIORITY_BATCH,
}


@dataclass(slots=True)
class Work:
    request_id: str
    trace_id: str
    key: KeyConfig
    generation: pb.Generation  # the caller's, with the mesh's defaults filled in
    progress: list[Progress]  # of each choice
    measure: Measure
    started: float  # seconds, time.perf_counter
    deadline: float  # same clock
    route: Decision | None = None  # to its model
    regions: Regions = ANYWHERE  # where it may be computed and kept
    prefix: TextPrefix | None = None  # once somebody asks which replica knows it
    terms: Terms | None = None  # once its model is known
    reservation: Reservation | None = None
    limit: str = ""  # that refused it, or ended its stream
    assessment: Assessment | None = None  # of its caller's risk, unless that is not looked at
    error: MeshError | None = None  # that ended it
    choice: Choice | None = None
    replica: Replica | None = None  # that computes, or was the last to
    replicas: list[str] = field(default_factory=list)  # all that computed, in order
    drawn: int = field(default_factory=lambda: secrets.randbits(64))  # the seed where the caller named none
    weighed: bool = False  # how sure the model is of its first tokens decides whether it goes on
    proven: bool = False  # its answer is computed again elsewhere, from these, one a token:
    logprobs: array[float] = field(default_factory=lambda: array("d"))
    resumable: bool = False  # what it made is kept for a caller who comes back
    resume_of: str = ""  # request id of the broken stream that this one goes on with
    asked: str = ""  # digest of the request, for one of these two
    revision: str = ""  # of the weights that made what there is; empty: any
    prompt_paid: bool = False  # with the stream that this one goes on with
    lookup: Lookup = field(default_factory=Lookup)
    input_verdict: pb.Verdict | None = None
    output_verdicts: list[pb.Verdict] = field(default_factory=list)
    judged: bool = False  # whether all of a whole answer passed the output guard, where there is one
    usage: pb.Usage = field(default_factory=pb.Usage)  # what the worker counted so far
    told: pb.Usage = field(default_factory=pb.Usage)  # what the last message that went out says: this is billed
    timing: pb.Timing = field(default_factory=pb.Timing)
    chunks: list[pb.Chunk] = field(default_factory=list)  # released, kept for the cache only
    finishes: dict[int, pb.FinishReason.ValueType] = field(default_factory=dict)  # by choice
    ends: dict[int, int] = field(default_factory=dict)  # by choice: offset after the last token that went out
    sent: int = 0  # completion tokens that went out, over all choices
    completion_limit: int = 0  # most tokens a choice can get, after the context's limit; 0 until a worker said so
    _wording: Wording | None = None  # of this input
    outcome: str = "cancelled"  # until something else is known: complete, or the reason of the error

    @classmethod
    def begin(
        cls,
        request: inference_pb2.StreamGenerateRequest,
        key: KeyConfig,
        ids: tuple[str, str],
        seconds: float | None,
        config: RouterConfig,
    ) -> Work:
        """Check the request and fill in defaults: it is the pipeline's own from now on. `ids` are those of request and
        trace.

        Raises MeshError REQUEST_INVALID or KEY_NOT_ALLOWED.
        """
        generation = request.generation  # as large as a prompt may be: not copied
        check_generation(generation)
        measured = measure(generation.input)
        _check_permissions(generation, key, measured, config)
        _check_resume(request, generation)
        if (wording := word(generation.input, key)).name:
            measured = replace(measured, tokens=measure(wording.source).tokens)
        if not generation.sampling.HasField("max_tokens"):
            generation.sampling.max_tokens = max(config.default_max_tokens, generation.sampling.min_tokens)
        # The key's priority is the default and the most urgent that it may ask for; a larger number is less urgent.
        generation.priority = max(generation.priority, _PRIORITIES[key.priority])
        now = time.perf_counter()
        limit = config.default_deadline_seconds if seconds is None else min(seconds, config.default_deadline_seconds)
        return cls(
            request_id=ids[0],
            trace_id=ids[1],
            key=key,
            generation=generation,
            progress=_progress(request, generation),
            resumable=request.resumable,
            resume_of=request.resume_of,
            measure=measured,
            started=now,
            deadline=now + limit,
            _wording=wording,
        )

    @property
    def weight(self) -> float:
        """Tokens and concurrent streams are counted so many times, at least 1."""
        return self.assessment.in_force if self.assessment is not None else 1.0

    @property
    def choices(self) -> int:
        return self.generation.sampling.n if self.generation.sampling.HasField("n") else 1

    @property
    def seed(self) -> int | None:
        """The seed of what is drawn; None for a greedy request."""
        sampling = self.generation.sampling
        if sampling.HasField("seed"):
            return sampling.seed
        return None if is_deterministic(sampling) else self.drawn

    @property
    def query(self) -> Query:
        """What decides on its model."""
        context = self.measure.tokens + self.generation.sampling.max_tokens
        return Query(self.generation, self.key, context, self.request_id, resumed=self.resumed)

    @property
    def resumed(self) -> bool:
        """Whether it goes on with a stream that broke."""
        return bool(self.resume_of) or any(choice.resume_from for choice in self.progress)

    @property
    def completion_at_most(self) -> int:
        """Most completion tokens that can come, over all choices."""
        asked = self.generation.sampling.max_tokens
        return self.choices * (min(asked, self.completion_limit) if self.completion_limit else asked)

    @property
    def billed(self) -> Usage:
        """What went out, as its last message says; nothing for an answer that was already there."""
        if self.lookup.answer is not None:
            return Usage()
        return Usage(self.told.prompt_tokens, self.told.cached_prompt_tokens, self.told.completion_tokens)

    def charged(self, completion: int) -> Usage:
        """What is to be billed once so many tokens went out: a prompt that is paid for costs nothing again."""
        if self.prompt_paid:
            return Usage(0, 0, completion)
        return Usage(self.usage.prompt_tokens, self.usage.cached_prompt_tokens, completion)

    @property
    def cost_micros(self) -> int | None:
        """Its price so far, millionths of the configured currency; None without a price."""
        return self.terms.cost(self.billed) if self.terms is not None else None

    @property
    def cache_salt(self) -> bytes:
        """Separates prefixes of tenants, and of cache keys within a tenant."""
        key = self.generation.cache_key.encode()
        return hashlib.sha256(self.key.tenant.encode() + b"\0" + key).digest()[:16]

    @property
    def wanted(self) -> Wanted:
        """What of it matters for the choice of a replica."""
        if self.prefix is None and not keeps_part(self.generation.kv_policy):  # those do not use the prefix cache
            self.prefix = TextPrefix(self.wording().source, self.cache_salt)
        return Wanted(
            model=self.generation.model,
            tenant=self.key.tenant,
            session=self.generation.session,
            tokens=self.usage.prompt_tokens or self.measure.tokens,
            prefix=self.prefix,
            regions=self.regions,
        )

    @property
    def complete(self) -> bool:
        return len(self.finishes) == self.choices

    @property
    def cacheable(self) -> bool:
        """Whether the answer may be given again, to keys whose guard must not fail and for the weights looked up."""
        cut = {pb.FINISH_REASON_CONTENT_FILTER, pb.FINISH_REASON_BUDGET_SPENT}
        whole = self.complete and not cut.intersection(self.finishes.values())
        return whole and self.judged and self.choice is not None and self.choice.revision == self.lookup.revision

    def wording(self) -> Wording:
        """The input as the model gets to read it; the same however often it is asked for."""
        if self._wording is None:
            self._wording = word(self.generation.input, self.key)
        return self._wording

    def redact(self, source: pb.Input) -> None:
        """From now on this is the input."""
        self.generation.input.CopyFrom(source)
        self._wording = None

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def late(self) -> bool:
        """Whether its caller's timer has run out: that one began before the request came here, and ends its call."""
        return time.perf_counter() >= self.deadline - _ON_THE_WAY

    def seconds_left(self) -> float:
        """Raises MeshError DEADLINE where nothing is left."""
        left = self.deadline - time.perf_counter()
        if left <= 0:
            raise MeshError(Reason.DEADLINE, "the deadline passed")
        return left

    def note_replica(self, replica: Replica) -> None:
        """A replica took it."""
        self.replica = replica
        self.replicas.append(replica.name)

    def replace_replica(self, replica: Replica) -> None:
        """A quicker one took its place."""
        self.replica = replica
        self.replicas[-1] = replica.name

    def forget_call(self) -> None:
        """What a worker made so far goes nowhere: another model begins anew."""
        self.progress, self.logprobs = [Progress() for _ in self.progress], array("d")
        self.replica, self.replicas, self.usage, self.weighed = None, [], pb.Usage(), False

    def note_worker(self, message: worker_pb2.RunGenerationResponse) -> None:
        """What the worker counted, and what it says of its own stages."""
        self.usage = message.usage
        if message.HasField("end"):
            timing = message.end.timing
            self.timing.queue, self.timing.prefill, self.timing.decode = timing.queue, timing.prefill, timing.decode

    def end_of(self, choice: int) -> int:
        """Offset after the last of its tokens that went out."""
        return self.ends.get(choice, self.progress[choice].resume_from)

    def after(self, chunk: pb.Chunk) -> Usage:
        """What will have gone out with this chunk."""
        return self.charged(self.sent + self._more(chunk))

    def _more(self, chunk: pb.Chunk) -> int:
        """Tokens of it that are to be billed."""
        paid = max(self.ends.get(chunk.choice, 0), self.progress[chunk.choice].paid_to)
        return max(0, chunk.token_offset + chunk.token_count - paid)

    def note(self, chunk: pb.Chunk) -> None:
        """A chunk goes out to the client."""
        self.sent += self._more(chunk)
        self.ends[chunk.choice] = chunk.token_offset + chunk.token_count
        if chunk.text and not self.timing.time_to_first_token:
            self.timing.time_to_first_token = self.elapsed()
        if chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
            self.finishes[chunk.choice] = chunk.finish_reason
        if self.lookup.flight:
            self.chunks.append(chunk)


def _check_permissions(generation: pb.Generation, key: KeyConfig, measured: Measure, config: RouterConfig) -> None:
    if generation.input.WhichOneof("input") == "token_ids" and not key.raw_prompts:
        raise MeshError(Reason.KEY_NOT_ALLOWED, "this key may not send token ids", metadata={"right": "raw_prompts"})
    check_size(measured, config, "generation.input")
    if generation.adapter:
        raise invalid("generation.adapter", "no adapter of this name is loaded")


def check_size(measured: Measure, config: RouterConfig, path: str) -> None:
    """Raises MeshError REQUEST_INVALID."""
    if measured.size > config.max_input_bytes:
        raise invalid(path, f"larger than {config.max_input_bytes} bytes")


def _check_resume(request: inference_pb2.StreamGenerateRequest, generation: pb.Generation) -> None:
    choices = max(1, generation.sampling.n)
    if request.resume_from and (choices > 1 or request.resume_from_choices):
        raise invalid("resume_from", "a request with several choices has `resume_from_choices` instead")
    if len(request.resume_from_choices) > choices:
        raise invalid("resume_from_choices", "more than the request has choices")
    if request.resume_of and not REQUEST_ID.fullmatch(request.resume_of):
        raise invalid("resume_of", "not an id of a request")
    for name in ("resume_from", "resume_from_choices"):
        if getattr(request, name) and not request.resume_of and not is_deterministic(generation.sampling):
            raise invalid(
                name,
                "only a deterministic request (temperature 0, or a seed), or one with `resume_of`, is resumed",
            )


def _progress(request: inference_pb2.StreamGenerateRequest, generation: pb.Generation) -> list[Progress]:
    """What the caller has of each choice."""
    has = list(request.resume_from_choices) or [request.resume_from]
    choices = max(1, generation.sampling.n)
    return [Progress(resume_from=tokens) for tokens in has + [0] * (choices - len(has))]
