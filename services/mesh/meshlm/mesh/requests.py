"""What a caller says by keyword, as the contract's `Generation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from meshlm.chassis.errors import invalid
from meshlm.v1 import generation_pb2 as pb

# In a mapping, `parts` may stand instead of `content`: a list of `{"text": ..., "untrusted": ...}` or of parts.
Turn = Mapping[str, Any] | pb.Message | tuple[str, str]
T = TypeVar("T")
Priority = Literal["critical", "interactive", "standard", "batch"]
CacheUse = Literal["default", "always", "bypass", "refresh"]
KvMode = Literal["full", "window", "importance"]

_PRIORITIES: Mapping[str, pb.Priority.ValueType] = {
    "critical": pb.PRIORITY_CRITICAL,
    "interactive": pb.PRIORITY_INTERACTIVE,
    "standard": pb.PRIORITY_STANDARD,
    "batch": pb.PRIORITY_BATCH,
}
_CACHE_USES: Mapping[str, pb.CachePolicy.ValueType] = {
    "default": pb.CACHE_POLICY_UNSPECIFIED,
    "always": pb.CACHE_POLICY_ALWAYS,
    "bypass": pb.CACHE_POLICY_BYPASS,
    "refresh": pb.CACHE_POLICY_REFRESH,
}
_KV_MODES: Mapping[str, pb.KvPolicy.Mode.ValueType] = {
    "full": pb.KvPolicy.MODE_FULL,
    "window": pb.KvPolicy.MODE_WINDOW,
    "importance": pb.KvPolicy.MODE_IMPORTANCE,
}


class Asked(TypedDict, total=False):
    """The keywords of a generation. Ranges and defaults are the contract's (`generation.proto`)."""

    # What to continue: exactly one of these three.
    messages: Sequence[Turn]
    prompt: str
    token_ids: Sequence[int]
    # Who answers, and how the request is treated.
    model: str
    adapter: str
    priority: Priority
    session: str
    cache_key: str
    cache: CacheUse
    labels: Mapping[str, str]
    return_token_ids: bool
    # What the worker remembers of the sequence: which tokens, at most how many, and how many first ones of a window.
    kv: KvMode
    kv_tokens: int
    kv_sinks: int
    # How tokens are drawn.
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    n: int


_SAMPLING_SCALARS = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"}
    | {"max_tokens", "min_tokens", "ignore_eos", "logprobs", "n"}
)


def generation(**asked: Unpack[Asked]) -> pb.Generation:
    """The message for these keywords. Raises MeshError REQUEST_INVALID for what the message cannot say."""
    built = pb.Generation(
        model=asked.get("model", ""),
        adapter=asked.get("adapter", ""),
        input=input_of(asked.get("messages"), asked.get("prompt"), asked.get("token_ids")),
        session=asked.get("session", ""),
        cache_key=asked.get("cache_key", ""),
        labels=asked.get("labels", {}),
        return_token_ids=asked.get("return_token_ids", False),
    )
    if (priority := asked.get("priority")) is not None:
        built.priority = _named(_PRIORITIES, priority, "priority")
    built.cache_policy = _named(_CACHE_USES, asked.get("cache", "default"), "cache")
    _sample(built.sampling, asked)
    _remember(built, asked)
    return built


def input_of(
    messages: Sequence[Turn] | None = None, prompt: str | None = None, token_ids: Sequence[int] | None = None
) -> pb.Input:
    """The contract's `Input`. Raises MeshError REQUEST_INVALID unless exactly one is given."""
    if sum(given is not None for given in (messages, prompt, token_ids)) != 1:
        raise invalid("input", "give exactly one of messages, prompt and token_ids")
    if messages is not None:
        return pb.Input(chat=pb.Chat(messages=[_turn(turn, i) for i, turn in enumerate(messages)]))
    if prompt is not None:
        return pb.Input(prompt=prompt)
    try:
        return pb.Input(token_ids=pb.TokenIds(ids=token_ids))
    except (ValueError, TypeError):
        raise invalid("token_ids", "expected integers of 32 bits, none negative") from None


def with_documents(question: str, documents: Sequence[str], role: str = "user") -> pb.Message:
    """A turn that brings texts of others along: they are judged as such, and the model gets them marked as data."""
    parts = [pb.Part(text=question), *(pb.Part(text=text, untrusted=True) for text in documents)]
    return pb.Message(role=role, parts=parts)


def _turn(turn: Turn, index: int) -> pb.Message:
    if isinstance(turn, pb.Message):
        return turn
    if isinstance(turn, tuple):
        return pb.Message(role=turn[0], content=turn[1])
    try:
        return pb.Message(**turn)
    except (ValueError, TypeError):
        raise invalid(f"messages[{index}]", "expected role, content (or parts) and perhaps name") from None


def _sample(sampling: pb.Sampling, asked: Asked) -> None:
    for name, value in asked.items():
        if name in _SAMPLING_SCALARS:
            try:
                setattr(sampling, name, value)
            except (ValueError, TypeError):
                raise invalid(name, "not a value of this field's type") from None
    sampling.stop.extend(asked.get("stop", ()))
    try:
        sampling.stop_token_ids.extend(asked.get("stop_token_ids", ()))
        sampling.logit_bias.update(asked.get("logit_bias", {}))
    except (ValueError, TypeError):
        raise invalid("stop_token_ids", "token ids are integers of 32 bits, none negative") from None


def _remember(built: pb.Generation, asked: Asked) -> None:
    if "kv" in asked:
        built.kv_policy.mode = _named(_KV_MODES, asked["kv"], "kv")
    try:
        if "kv_tokens" in asked:
            built.kv_policy.tokens = asked["kv_tokens"]
        if "kv_sinks" in asked:
            built.kv_policy.sinks = asked["kv_sinks"]
    except (ValueError, TypeError):
        raise invalid("kv_tokens", "kv_tokens and kv_sinks are integers of 32 bits, none negative") from None


def _named(table: Mapping[str, T], name: str, field: str) -> T:
    if name not in table:
        raise invalid(field, f"expected one of {', '.join(table)}")
    return table[name]
