"""From a request to a plan: checked, encoded, and fitted into the model's context."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import msgspec

from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.chassis.validation import KV_SINKS, check_generation, keeps_part
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.engine.budgets import Budgets
from meshlm.worker.front.prompts import Prompts
from meshlm.worker.messages import KvBudget, Limits, ModelFacts, Sampling, Submit

# Smaller goes first; see the scheduler for what a step is worth.
PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: 0,
    pb.PRIORITY_CRITICAL: -1,
    pb.PRIORITY_INTERACTIVE: 0,
    pb.PRIORITY_STANDARD: 1,
    pb.PRIORITY_BATCH: 2,
}
# Fields that the wire and the engine know under the same name, with the same neutral values where they are unset.
_DRAWING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
)
_MOST_TOP_K = (1 << 31) - 1  # engines count in 32 bits with a sign; no vocabulary comes near it
_SEEDS = 1 << 64
MAX_TENANT_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class SoFar:
    """What there is of one choice, made elsewhere."""

    generated: list[int] = field(default_factory=list)
    resume_from: int = 0  # tokens that are not sent again
    ended: bool = False  # nothing of it is made or sent


_NOTHING = SoFar()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One generation, ready for the engine."""

    prompt: list[int]
    so_far: tuple[SoFar, ...]  # by choice; empty: there is nothing of any
    sampling: Sampling  # of choice 0
    limits: Limits
    stops: tuple[str, ...]
    choices: int
    priority: int
    cache_salt: bytes
    tenant: str
    kv: KvBudget | None
    return_token_ids: bool

    def already(self, choice: int) -> SoFar:
        """What there is of a choice."""
        return self.so_far[choice] if self.so_far else _NOTHING

    def submit(self, identifier: str, choice: int, *, admitted: bool) -> Submit:
        """The sequence of one choice. `admitted`: another one of this request is in already."""
        seed = (self.sampling.seed + choice) % _SEEDS
        return Submit(
            id=identifier,
            prompt=self.prompt,
            generated=self.already(choice).generated,
            sampling=msgspec.structs.replace(self.sampling, seed=seed),
            limits=self.limits,
            priority=self.priority,
            admitted=admitted,
            cache_salt=self.cache_salt,
            tenant=self.tenant,
            kv=self.kv,
            arrival=time.monotonic(),
        )


async def make_plan(
    request: worker_pb2.RunGenerationRequest,
    prompts: Prompts,
    facts: ModelFacts,
    budgets: Budgets,
    model: str,
    seconds: float | None,
) -> Plan:
    """`seconds`: until the caller's deadline. Raises MeshError: REQUEST_INVALID, MODEL_UNKNOWN, CONTEXT_TOO_LONG."""
    generation = request.generation
    check_generation(generation)
    check_model(generation.model, model)
    check_tenant(request.tenant)
    if generation.adapter:
        raise MeshError(Reason.MODEL_UNKNOWN, "this worker has no such adapter", metadata={"model": model})
    _check_resumption(request, facts)
    _check_token_ids(generation.sampling, facts)
    kv = _kv_budget(generation.kv_policy, facts, budgets)
    prompt = await prompts.encode(
        generation.input, control_tokens=request.allow_control_tokens, vocab_size=facts.vocab_size
    )
    return Plan(
        prompt=prompt,
        so_far=_so_far(request),
        sampling=_sampling(generation.sampling),
        limits=_limits(generation.sampling, _eos_ids(prompts, facts), _room(prompt, facts, kv), seconds),
        stops=tuple(generation.sampling.stop),
        choices=generation.sampling.n or 1,
        priority=PRIORITIES.get(generation.priority, 0),
        cache_salt=request.cache_salt,
        tenant=request.tenant,
        kv=kv,
        return_token_ids=generation.return_token_ids,
    )


def check_model(asked: str, served: str) -> None:
    """Raises MeshError MODEL_UNKNOWN."""
    if asked not in ("", served):
        raise MeshError(Reason.MODEL_UNKNOWN, "this worker serves another model", metadata={"model": served})


def check_tenant(tenant: str) -> None:
    """Raises MeshError REQUEST_INVALID."""
    if len(tenant.encode()) > MAX_TENANT_BYTES:
        raise invalid("tenant", f"longer than {MAX_TENANT_BYTES} bytes")


def _kv_budget(policy: pb.KvPolicy, facts: ModelFacts, budgets: Budgets) -> KvBudget | None:
    """Raises MeshError REQUEST_INVALID where this engine cannot drop tokens, or not so that the budget is kept."""
    if not keeps_part(policy):
        return None
    if not facts.kv_budgets:
        raise invalid("generation.kv_policy.mode", f"this worker's engine ({facts.engine}) keeps all tokens")
    if policy.mode == pb.KvPolicy.MODE_IMPORTANCE:
        budget = KvBudget(policy="importance", tokens=policy.tokens)
    else:
        sinks = policy.sinks if policy.HasField("sinks") else KV_SINKS
        budget = KvBudget(policy="window", tokens=policy.tokens, sinks=sinks)
    if not budgets.possible(budget, facts.total_blocks):
        raise invalid(
            "generation.kv_policy.tokens", "too few for what always stays, or more than the worker has room for"
        )
    return budget


def _check_resumption(request: worker_pb2.RunGenerationRequest, facts: ModelFacts) -> None:
    choices = request.generation.sampling.n or 1
    if (request.resume_from or request.generated) and (choices > 1 or request.so_far):
        raise invalid("resume_from", "a generation with several choices, or with `so_far`, has it there")
    if len(request.so_far) not in (0, choices):
        raise invalid("so_far", "needs one for each choice, or none")
    if request.so_far and all(choice.ended for choice in request.so_far):
        raise invalid("so_far", "every choice has ended: there is nothing to go on with")
    if any(choice.ended and choice.resume_from > facts.max_context for choice in request.so_far):
        raise invalid("so_far", "a choice cannot be longer than the context")
    for name, made in [("generated", request.generated), *(("so_far", choice.generated) for choice in request.so_far)]:
        if any(token >= facts.vocab_size for token in made):
            raise invalid(name, f"each token id must be below {facts.vocab_size}")


def _so_far(request: worker_pb2.RunGenerationRequest) -> tuple[SoFar, ...]:
    if request.generated or request.resume_from:
        return (SoFar(generated=list(request.generated), resume_from=request.resume_from),)
    return tuple(
        SoFar(generated=list(choice.generated), resume_from=choice.resume_from, ended=choice.ended)
        for choice in request.so_far
    )


def _check_token_ids(sampling: pb.Sampling, facts: ModelFacts) -> None:
    for name, ids in (("logit_bias", sampling.logit_bias.keys()), ("stop_token_ids", sampling.stop_token_ids)):
        if any(token >= facts.vocab_size for token in ids):
            raise invalid(f"generation.sampling.{name}", f"each token id must be below {facts.vocab_size}")


def longest_sequence(facts: ModelFacts, kv: KvBudget | None = None) -> int:
    """Most tokens of a sequence, prompt and answer: what the model knows, and unless there is a budget, what the KV
    cache has room for."""
    return facts.max_context if kv is not None else min(facts.max_context, facts.total_blocks * facts.block_size)


def _room(prompt: list[int], facts: ModelFacts, kv: KvBudget | None) -> int:
    """Tokens that the context leaves for an answer. Raises MeshError CONTEXT_TOO_LONG."""
    longest = longest_sequence(facts, kv)
    fitting = longest - 1
    if kv is not None and kv.policy == "importance":  # holds the whole prompt until it is computed
        fitting = min(fitting, facts.total_blocks * facts.block_size)
    if len(prompt) > fitting:
        raise MeshError(
            Reason.CONTEXT_TOO_LONG,
            f"the input has {len(prompt)} tokens; {fitting} fit",
            metadata={"prompt_tokens": str(len(prompt)), "max_context": str(fitting + 1)},
        )
    return longest - len(prompt)


def _sampling(sampling: pb.Sampling) -> Sampling:
    given = {field.name: value for field, value in sampling.ListFields() if field.name in _DRAWING}
    if "top_k" in given:
        given["top_k"] = min(given["top_k"], _MOST_TOP_K)
    return Sampling(
        **given,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def _eos_ids(prompts: Prompts, facts: ModelFacts) -> frozenset[int]:
    """Of the tokenizer, which may know more tokens than the model: those are never drawn."""
    return frozenset(token for token in prompts.tokenizer.eos_ids if token < facts.vocab_size)


def _limits(sampling: pb.Sampling, eos_ids: frozenset[int], room: int, seconds: float | None) -> Limits:
    stop_tokens = frozenset(sampling.stop_token_ids)
    return Limits(
        max_tokens=min(sampling.max_tokens or room, room),
        min_tokens=sampling.min_tokens,
        stop_token_ids=stop_tokens if sampling.ignore_eos else stop_tokens | eos_ids,
        deadline=None if seconds is None else time.monotonic() + seconds,
    )
