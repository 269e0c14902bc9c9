"""What a generation may ask for: the ranges that `generation.proto` states, checked at every door it comes through.

Everything here raises `MeshError` REQUEST_INVALID with the field's path.
"""

from __future__ import annotations

import math
import re

from meshlm.chassis.errors import invalid
from meshlm.v1 import generation_pb2 as pb

MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_CHOICES = 8
MAX_LOGPROBS = 20
MAX_LABELS = 16
KV_TOKENS = (64, 1 << 20)  # fewest and most that a KV budget may name
KV_SINKS = 16  # where a window names none
_TOKEN_LIMIT = 2**31
_NUMBERS = {"priority": frozenset(pb.Priority.values()), "cache_policy": frozenset(pb.CachePolicy.values())}
_MODES = frozenset(pb.KvPolicy.Mode.values())
_SPEAKER = re.compile(r"[A-Za-z0-9_-]{1,64}")

# field, least, most, whether the least itself is allowed
_RANGES = (
    ("temperature", 0.0, 2.0, True),
    ("top_p", 0.0, 1.0, False),
    ("min_p", 0.0, 1.0, True),
    ("repetition_penalty", 0.0, 100.0, False),
    ("presence_penalty", -2.0, 2.0, True),
    ("frequency_penalty", -2.0, 2.0, True),
)


def check_generation(generation: pb.Generation) -> None:
    """A generation's own consistency; whether the model exists and the input fits is for others to say."""
    check_input(generation.input)
    check_sampling(generation.sampling)
    check_kv_policy(generation.kv_policy)
    for name, numbers in _NUMBERS.items():
        if getattr(generation, name) not in numbers:  # proto3 lets any number through
            raise invalid(f"generation.{name}", "not one of its values")
    for name in ("session", "cache_key"):
        if len(getattr(generation, name).encode()) > 128:
            raise invalid(f"generation.{name}", "longer than 128 bytes")
    if len(generation.labels) > MAX_LABELS:
        raise invalid("generation.labels", f"more than {MAX_LABELS}")
    for key, value in generation.labels.items():
        if not 1 <= len(key.encode()) <= 63 or len(value.encode()) > 255:
            raise invalid("generation.labels", "a key must have 1 to 63 bytes, a value at most 255")


def check_input(source: pb.Input, path: str = "generation.input") -> None:
    kind = source.WhichOneof("input")
    if kind is None:
        raise invalid(path, "one of chat, prompt or token_ids is required")
    if kind == "chat":
        messages = source.chat.messages
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise invalid(f"{path}.chat.messages", f"1 to {MAX_MESSAGES} are required")
        for number, message in enumerate(messages):
            if message.role not in ("system", "user", "assistant", "tool"):
                raise invalid(f"{path}.chat.messages[{number}].role", "must be system, user, assistant or tool")
            if message.HasField("name") and not _SPEAKER.fullmatch(message.name):  # templates print it
                raise invalid(f"{path}.chat.messages[{number}].name", "must have 1 to 64 of A-Z a-z 0-9 _ -")
            _check_parts(message, f"{path}.chat.messages[{number}].parts")
    elif kind == "prompt" and not source.prompt:
        raise invalid(f"{path}.prompt", "must not be empty")
    elif kind == "token_ids" and not source.token_ids.ids:
        raise invalid(f"{path}.token_ids", "must not be empty")


def _check_parts(message: pb.Message, path: str) -> None:
    if message.parts and message.content:
        raise invalid(path, "a message has content or parts, not both")
    if len(message.parts) > MAX_PARTS:
        raise invalid(path, f"more than {MAX_PARTS}")


def check_sampling(sampling: pb.Sampling, path: str = "generation.sampling") -> None:
    given = {field.name for field, _ in sampling.ListFields()}
    for name, least, most, closed in _RANGES:
        if name in given:
            value = getattr(sampling, name)
            if not (math.isfinite(value) and least <= value <= most and (closed or value > least)):
                raise invalid(f"{path}.{name}", f"must be in {'[' if closed else '('}{least:g}, {most:g}]")
    _check_lengths(sampling, path)
    _check_stops(sampling, path)
    if len(sampling.logit_bias) > MAX_BIASES:
        raise invalid(f"{path}.logit_bias", f"more than {MAX_BIASES} entries")
    if any(not -100 <= bias <= 100 for bias in sampling.logit_bias.values()):  # also refuses NaN
        raise invalid(f"{path}.logit_bias", "must be in [-100, 100]")
    if sampling.HasField("logprobs") and sampling.logprobs > MAX_LOGPROBS:
        raise invalid(f"{path}.logprobs", f"must be at most {MAX_LOGPROBS}")
    if sampling.HasField("n") and not 1 <= sampling.n <= MAX_CHOICES:
        raise invalid(f"{path}.n", f"must be in [1, {MAX_CHOICES}]")


def _check_lengths(sampling: pb.Sampling, path: str) -> None:
    if sampling.HasField("max_tokens") and not 1 <= sampling.max_tokens < _TOKEN_LIMIT:
        raise invalid(f"{path}.max_tokens", "must be at least 1")
    if sampling.HasField("max_tokens") and sampling.min_tokens > sampling.max_tokens:
        raise invalid(f"{path}.min_tokens", "must be at most max_tokens")
    if sampling.min_tokens >= _TOKEN_LIMIT:
        raise invalid(f"{path}.min_tokens", "too large")


def _check_stops(sampling: pb.Sampling, path: str) -> None:
    if len(sampling.stop) > MAX_STOPS:
        raise invalid(f"{path}.stop", f"more than {MAX_STOPS}")
    if any(not 1 <= len(stop.encode()) <= MAX_STOP_BYTES for stop in sampling.stop):
        raise invalid(f"{path}.stop", f"each must have 1 to {MAX_STOP_BYTES} bytes")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise invalid(f"{path}.stop_token_ids", f"more than {MAX_STOP_TOKENS}")


def check_kv_policy(policy: pb.KvPolicy, path: str = "generation.kv_policy") -> None:
    mode, (least, most) = policy.mode, KV_TOKENS
    if mode not in _MODES:
        raise invalid(f"{path}.mode", "not one of its values")
    if not keeps_part(policy):
        if policy.tokens:
            raise invalid(f"{path}.tokens", "has no meaning where all tokens stay")
    elif not least <= policy.tokens <= most:
        raise invalid(f"{path}.tokens", f"must be in [{least}, {most}]")
    if policy.HasField("sinks"):
        if mode != pb.KvPolicy.MODE_WINDOW:
            raise invalid(f"{path}.sinks", "has no meaning but for a window")
        if 2 * policy.sinks > policy.tokens:
            raise invalid(f"{path}.sinks", "must be at most half of tokens")


def keeps_part(policy: pb.KvPolicy) -> bool:
    """Whether some tokens may leave the KV cache, which can change the answer."""
    return policy.mode in (pb.KvPolicy.MODE_WINDOW, pb.KvPolicy.MODE_IMPORTANCE)


def is_deterministic(sampling: pb.Sampling) -> bool:
    """Whether the same request gives the same tokens: greedy, or with a seed."""
    greedy = sampling.HasField("temperature") and sampling.temperature == 0
    return greedy or sampling.HasField("seed")
