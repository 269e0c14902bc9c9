"""From settings to a runner that is loaded and warm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from meshlm.kernels.linear import int8_supported
from meshlm.worker.engine.runner import TorchRunner
from meshlm.worker.engine.sequence import Chunk, Sequence
from meshlm.worker.loading.checkpoint import open_checkpoint
from meshlm.worker.loading.rotated import rotated
from meshlm.worker.messages import Limits, ModelFacts, Sampling, Submit
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.layers import Placement
from meshlm.worker.models.registry import load_model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WARM_UP_STEPS = 3

LoadProgress = Callable[[str, int, int], None]  # (stage: "load" or "warm_up", done, total)


class SettingsError(ValueError):
    """Settings that cannot be met on this machine; the text says which and why."""


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """What a worker's config says about its model. `kv_blocks`, where set, wins over `kv_memory`."""

    model: Path  # a GGUF file or a Hugging Face folder
    quantization: Literal["none", "int8", "auto"] = "auto"  # auto: int8 on a CPU that can, else none
    kv_memory: int = 1 << 30  # bytes
    kv_blocks: int | None = None
    block_size: int = 16  # tokens, a power of two
    max_context: int | None = None  # tokens; None is the model's own
    threads: int | None = None  # None leaves torch's choice
    device: str = "cpu"  # as torch names it: "cpu", "cuda", "cuda:1"
    dtype: Literal["float32", "bfloat16"] = "float32"


def load_runner(settings: RunnerSettings, progress: LoadProgress) -> TorchRunner:
    """Read the model, allocate the cache, run the first steps. Raises ModelFileError and SettingsError."""
    placement = _placement(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    checkpoint = open_checkpoint(settings.model)
    max_context = min(settings.max_context or checkpoint.config.max_context, checkpoint.config.max_context)
    config, dtype = replace(checkpoint.config, max_context=max_context), placement.dtype
    checkpoint = replace(checkpoint, config=config)
    block_bytes = config.kv_bytes_per_token(dtype.itemsize) * settings.block_size
    blocks = settings.kv_blocks if settings.kv_blocks is not None else settings.kv_memory // block_bytes
    if blocks < 1:
        raise SettingsError(f"kv_memory is {settings.kv_memory} bytes; one block of this model takes {block_bytes}")
    source = rotated(checkpoint) if placement.int8 else checkpoint
    model = load_model(source, placement, lambda done, total: progress("load", done, total))
    facts = ModelFacts(
        architecture=config.architecture,
        vocab_size=config.vocab_size,
        max_context=max_context,
        block_size=settings.block_size,
        total_blocks=blocks,
        weight_bytes=model.weight_bytes,
        kv_bytes=blocks * block_bytes,
        quantization="int8" if placement.int8 else "none",
        parameters=config.parameters,
    )
    runner = TorchRunner(model, facts, dtype, placement.device)
    _warm_up(runner, config, progress)
    return runner


def _placement(settings: RunnerSettings) -> Placement:
    device, size = torch.device(settings.device), settings.block_size
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {settings.device!r}: torch sees no CUDA device")
    if size < 1 or size & (size - 1):
        raise SettingsError(f"block_size {size} is not a power of two")
    if settings.quantization == "int8" and not int8_supported(device):
        raise SettingsError(f"quantization int8 runs on CPUs with fbgemm only, not on {settings.device!r}")
    if settings.quantization == "int8" and settings.dtype != "float32":
        raise SettingsError("quantization int8 computes in float32; set dtype to float32")
    int8 = settings.quantization == "int8" or (
        settings.quantization == "auto" and settings.dtype == "float32" and int8_supported(device)
    )
    return Placement(device, _DTYPES[settings.dtype], int8)


def _warm_up(runner: TorchRunner, config: ModelConfig, progress: LoadProgress) -> None:
    """Prefill and decode a throw-away sequence in the still empty cache: the first steps pay for lazy setup."""
    size = runner.facts.block_size
    prompt = [index % config.vocab_size for index in range(min(size, runner.facts.max_context) - 1)] or [0]
    request = Submit(id="warm-up", prompt=prompt, sampling=Sampling(), limits=Limits(max_tokens=_WARM_UP_STEPS))
    sequence = Sequence(request, [*prompt, 0], blocks=[0] * (1 + size))
    for step in range(_WARM_UP_STEPS):
        chunk = Chunk(sequence, 0, len(prompt), True) if step == 0 else Chunk(sequence, len(prompt), 1, True)
        runner.run([chunk])
        progress("warm_up", step + 1, _WARM_UP_STEPS)
    runner.forget(sequence)
