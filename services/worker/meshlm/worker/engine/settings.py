"""What a worker's config says about its model, and what of it follows for any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from meshlm.worker.models.config import ModelConfig

MOST_KV_MEMORY = 1 << 30  # bytes, on a CPU where nothing is said

LoadProgress = Callable[[str, int, int], None]  # (stage: "load" or "warm_up", done, total)


class SettingsError(ValueError):
    """Settings that cannot be met on this machine; the text says which and why."""


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """What a worker's config says about its model. `kv_blocks`, where set, wins over `kv_memory`."""

    model: Path  # a GGUF file or a Hugging Face folder
    # auto: Triton on a GPU; on a CPU native where its library is there, else torch
    engine: Literal["auto", "native", "torch", "triton"] = "auto"
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = "auto"
    # auto: bfloat16 natively, else `dtype`
    kv_dtype: Literal["auto", "float32", "bfloat16", "fp8", "int8", "int4"] = "auto"
    kv_memory: int | None = None  # bytes; None: on a GPU what `gpu_fraction` leaves, else see `wanted_blocks`
    kv_blocks: int | None = None
    block_size: int = 16  # tokens, a power of two
    max_context: int | None = None  # tokens; None is the model's own
    threads: int | None = None  # None leaves torch's choice, the physical cores
    device: str = "cpu"  # as torch names it: "cpu", "cuda", "cuda:1"
    # of torch's and Triton's weights and activations; auto: bfloat16 on a GPU, else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gpu_fraction: float = 0.9  # of a GPU's memory, to be used in all
    step_tokens: int = 544  # most of a step
    max_running: int = 32  # most sequences of a step

    @property
    def dtype_name(self) -> Literal["float32", "bfloat16"]:
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if self.device.startswith("cuda") else "float32"


def runner_settings(fields: dict[str, Any]) -> RunnerSettings:
    """From what JSON makes of them. Raises msgspec.ValidationError."""
    return msgspec.convert(fields, RunnerSettings, dec_hook=_from_builtin)


def _from_builtin(kind: type, value: Any) -> Any:
    """For the field types that JSON does not know: paths."""
    return kind(value)


def wanted_blocks(settings: RunnerSettings, context: int, block_bytes: int) -> int:
    """KV blocks as the settings want them; where they say nothing, for one text of the whole context, in at most
    MOST_KV_MEMORY. Raises SettingsError: no room for a single one."""
    if settings.kv_blocks is not None:
        return settings.kv_blocks
    memory = settings.kv_memory
    if memory is None:
        memory = min(MOST_KV_MEMORY, -(-context // settings.block_size) * block_bytes)
    if memory < block_bytes:
        raise SettingsError(f"kv_memory is {memory} bytes; one block of this model takes {block_bytes}")
    return memory // block_bytes


def model_facts(settings: RunnerSettings, config: ModelConfig, blocks: int, block_bytes: int) -> dict[str, Any]:
    """The fields of ModelFacts that do not depend on who runs the model."""
    return {
        "architecture": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "max_context": config.max_context,
        "block_size": settings.block_size,
        "total_blocks": blocks,
        "kv_bytes": blocks * block_bytes,
        "parameters": config.parameters,
    }
