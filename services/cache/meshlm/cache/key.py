"""The key of an answer: a digest over everything that can change it, and over nothing else.

Defaults are resolved first, so that an unset field and its explicit default give the same key. Priority, session,
labels and the cache policy are left out: they decide when and where an answer is made, not what it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from meshlm.chassis.errors import invalid
from meshlm.chassis.parts import pieces
from meshlm.chassis.validation import KV_SINKS, keeps_part
from meshlm.v1 import generation_pb2 as g

# Raised when the encoding changes: older answers are then never found.
_ENCODING = 3
_TEXT = re.compile(r"([0-9a-f]{16}):([0-9a-f]{64})")


@dataclass(frozen=True)
class Key:
    """Names an answer. `tenant` and `answer` are hex digests; Redis keys of one tenant share a hash slot."""

    tenant: str
    answer: str

    @classmethod
    def parse(cls, text: str) -> Key:
        """The inverse of `str`. Raises MeshError REQUEST_INVALID."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise invalid("key", "not a key from LookUp")
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"{self.tenant}:{self.answer}"

    @property
    def answer_name(self) -> str:
        """Redis key of the stored answer."""
        return f"meshlm:{{cache:{self.tenant}}}:answer:{self.answer}"

    @property
    def flight_name(self) -> str:
        """Redis key of the flight: the id of who generates the answer now."""
        return f"meshlm:{{cache:{self.tenant}}}:flight:{self.answer}"


def derive(
    tenant: str,
    generation: g.Generation,
    model_revision: str,
    policy: str,
    *,
    control_tokens: bool = False,
    wording: str = "",
) -> Key:
    """The key; `control_tokens` and `wording` as in LookUpRequest.

    Raises MeshError REQUEST_INVALID for a generation without input.
    """
    if not tenant:
        raise invalid("tenant", "required")
    content = {
        "encoding": _ENCODING,
        "tenant": tenant,
        "model": generation.model,
        "revision": model_revision,
        "adapter": generation.adapter,
        "policy": policy,
        "scope": generation.cache_key,
        "ids": generation.return_token_ids,
        "input": _input(generation.input),
        "control": control_tokens and generation.input.HasField("prompt"),  # nowhere else do they count
        "sampling": _sampling(generation.sampling),
        "kv": _kv(generation.kv_policy),
        "wording": wording,
    }
    # JSON with sorted names and escaped text is injective: two contents never share an encoding.
    encoded = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Key(hashlib.sha256(tenant.encode()).hexdigest()[:16], hashlib.sha256(encoded.encode()).hexdigest())


def _input(value: g.Input) -> dict[str, Any]:
    match value.WhichOneof("input"):
        case "chat":
            messages = [[m.role, pieces(m), _optional(m, "name")] for m in value.chat.messages]
            opens = value.chat.add_generation_prompt if value.chat.HasField("add_generation_prompt") else True
            return {"chat": messages, "opens": opens}
        case "prompt":
            return {"prompt": value.prompt}
        case "token_ids":
            return {"token_ids": list(value.token_ids.ids)}
        case _:
            raise invalid("generation.input", "required")


# Neutral values from generation.proto. Fields that are not here have no value that equals unset.
_DEFAULTS: dict[str, float | int | None] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "n": 1,
    "seed": None,  # unset is a random draw
    "max_tokens": None,  # unset is what the context leaves
    "logprobs": None,  # 0 reports the chosen token's
}


def _sampling(sampling: g.Sampling) -> dict[str, Any]:
    resolved = {name: _optional(sampling, name, default) for name, default in _DEFAULTS.items()}
    # Adding 0.0 makes one of the two zeros.
    content: dict[str, Any] = {k: v + 0.0 if isinstance(v, float) else v for k, v in resolved.items()}
    content["logit_bias"] = sorted((token, bias) for token, bias in sampling.logit_bias.items() if bias != 0)
    content["stop"] = list(sampling.stop)  # in order: it decides which of two that match together is told
    content["stop_token_ids"] = sorted(set(sampling.stop_token_ids))
    content["ignore_eos"] = sampling.ignore_eos
    return content


def _kv(policy: g.KvPolicy) -> list[int] | None:
    """What is dropped from the KV cache is missing from the answer; None where nothing is."""
    if not keeps_part(policy):
        return None
    windowed = policy.mode == g.KvPolicy.MODE_WINDOW
    return [policy.mode, policy.tokens, _optional(policy, "sinks", KV_SINKS) if windowed else 0]


def _optional(message: Any, name: str, default: Any = None) -> Any:
    return getattr(message, name) if message.HasField(name) else default
