"""From settings to a runner that is loaded and warm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import structlog
import torch

from meshlm.kernels.native.library import Library, NativeUnavailableError, Pool, open_library
from meshlm.kernels.native.ops import Cache, CacheShape
from meshlm.worker.engine.native_runner import NativeRunner
from meshlm.worker.engine.runner import TorchRunner
from meshlm.worker.engine.sequence import Chunk, Runner, Sequence
from meshlm.worker.loading.checkpoint import Checkpoint, open_checkpoint
from meshlm.worker.messages import Limits, ModelFacts, Sampling, Submit
from meshlm.worker.models.dense_weights import DenseWeights
from meshlm.worker.models.native_decoder import NativeDecoder, PackedWeights
from meshlm.worker.models.registry import load_decoder
from meshlm.worker.models.torch_decoder import TorchDecoder
from meshlm.worker.quantization.cache import plan_for
from meshlm.worker.quantization.plan import quantized_matrix

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WARM_UP_STEPS = 3
NATIVE_BLOCK = 16  # tokens; native blocks are multiples of it
MOST_EXPERTS = 256  # of a layer: `Decoder::route` in native/src/step.cpp keeps their logits on the stack
MOST_KV_MEMORY = 1 << 30  # bytes, where nothing is said
SPIN_US = 200  # a thread that waits for the next step spins so long, then sleeps

LoadProgress = Callable[[str, int, int], None]  # (stage: "load" or "warm_up", done, total)

log = structlog.get_logger()


class SettingsError(ValueError):
    """Settings that cannot be met on this machine; the text says which and why."""


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """What a worker's config says about its model. `kv_blocks`, where set, wins over `kv_memory`."""

    model: Path  # a GGUF file or a Hugging Face folder
    engine: Literal["auto", "native", "torch"] = "auto"  # auto: native on a CPU where its library is there
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = "auto"
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"  # auto: bfloat16 natively, else `dtype`
    kv_memory: int | None = None  # bytes; None is what a text of the whole context needs, at most MOST_KV_MEMORY
    kv_blocks: int | None = None
    block_size: int = 16  # tokens, a power of two
    max_context: int | None = None  # tokens; None is the model's own
    threads: int | None = None  # None leaves torch's choice, the physical cores
    device: str = "cpu"  # as torch names it: "cpu", "cuda", "cuda:1"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of torch's weights and activations
    step_tokens: int = 544  # most of a step
    max_running: int = 32  # most sequences of a step


def load_runner(settings: RunnerSettings, progress: LoadProgress) -> Runner:
    """Read the model, allocate the cache, run the first steps. Raises ModelFileError and SettingsError."""
    _check(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    checkpoint = open_checkpoint(settings.model)
    context = min(settings.max_context or checkpoint.config.max_context, checkpoint.config.max_context)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, max_context=context))
    library = _native_library(settings)
    runner = (
        _torch_runner(settings, checkpoint, progress)
        if library is None
        else _native_runner(settings, checkpoint, library, progress)
    )
    _warm_up(runner, progress)
    return runner


def _check(settings: RunnerSettings) -> None:
    device, size = torch.device(settings.device), settings.block_size
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {settings.device!r}: torch sees no CUDA device")
    if size < 1 or size & (size - 1):
        raise SettingsError(f"block_size {size} is not a power of two")
    if settings.quantization == "fp8":
        raise SettingsError("quantization fp8 needs a GPU that multiplies it, which this engine cannot use yet")
    if settings.engine == "native" and device.type != "cpu":
        raise SettingsError(f"the native engine runs on CPUs only, not on {settings.device!r}")


def _native_library(settings: RunnerSettings) -> Library | None:
    """The native kernels, or None where torch is to run. Raises SettingsError where they were asked for in vain."""
    if settings.engine == "torch" or torch.device(settings.device).type != "cpu":
        return None
    try:
        library = open_library()
    except NativeUnavailableError as error:
        if settings.engine == "native":
            raise SettingsError(f"the native engine: {error}") from None
        log.warning(
            "torch runs the model, for the native kernels are missing: answers take ten times as long or more, and the "
            "weights several times the memory",
            reason=str(error),
        )
        return None
    if settings.block_size % NATIVE_BLOCK:
        raise SettingsError(f"block_size {settings.block_size}: the native engine wants multiples of {NATIVE_BLOCK}")
    return library


def _native_runner(
    settings: RunnerSettings, checkpoint: Checkpoint, library: Library, progress: LoadProgress
) -> NativeRunner:
    config = checkpoint.config
    if config.experts > MOST_EXPERTS:
        raise SettingsError(
            f"the native engine knows up to {MOST_EXPERTS} experts, and this model has {config.experts}"
        )
    plan = plan_for(settings.quantization, settings.model)
    kv_dtype = "bfloat16" if settings.kv_dtype == "auto" else settings.kv_dtype
    shape = CacheShape(config.layers, 0, config.kv_heads, settings.block_size, config.head_dim, kv_dtype)
    block_bytes = Cache(library, shape).block_bytes * config.layers * config.kv_heads
    blocks = _blocks(settings, config.max_context, block_bytes)
    weights = PackedWeights(
        checkpoint, library, lambda name, rows, cols: quantized_matrix(checkpoint, name, rows, cols, plan)
    )
    decoder = load_decoder(checkpoint, weights, lambda done, total: progress("load", done, total))
    cache = Cache(library, replace(shape, blocks=blocks))
    pool = Pool(library, settings.threads or torch.get_num_threads(), SPIN_US)
    native = NativeDecoder(
        decoder, cache, library, pool, max_rows=settings.step_tokens, max_outputs=settings.max_running
    )
    facts = ModelFacts(
        **_facts(settings, checkpoint, blocks, block_bytes),
        weight_bytes=native.weight_bytes,
        quantization=plan.name,
        chunk_invariant=True,
        kv_budgets=True,
        kv_dtype=kv_dtype,
        engine=f"native ({library.isa})",
    )
    return NativeRunner(native, facts, max_rows=settings.step_tokens, max_outputs=settings.max_running)


def _torch_runner(settings: RunnerSettings, checkpoint: Checkpoint, progress: LoadProgress) -> TorchRunner:
    if settings.quantization in ("int8", "int4"):
        raise SettingsError(f"quantization {settings.quantization} needs the native engine")
    if settings.kv_dtype not in ("auto", settings.dtype):
        raise SettingsError(f"kv_dtype {settings.kv_dtype}: torch's KV cache is of `dtype`, {settings.dtype}")
    config, dtype, device = checkpoint.config, _DTYPES[settings.dtype], torch.device(settings.device)
    block_bytes = config.kv_bytes_per_token(dtype.itemsize) * settings.block_size
    blocks = _blocks(settings, config.max_context, block_bytes)
    decoder = load_decoder(
        checkpoint, DenseWeights(checkpoint, device, dtype), lambda done, total: progress("load", done, total)
    )
    model = TorchDecoder(decoder)
    facts = ModelFacts(
        **_facts(settings, checkpoint, blocks, block_bytes),
        weight_bytes=model.weight_bytes,
        quantization="none",
        kv_dtype=settings.dtype,
        engine="torch",
    )
    return TorchRunner(model, facts, dtype, device)


def _blocks(settings: RunnerSettings, context: int, block_bytes: int) -> int:
    if settings.kv_blocks is not None:
        return settings.kv_blocks
    memory = settings.kv_memory
    if memory is None:
        memory = min(MOST_KV_MEMORY, -(-context // settings.block_size) * block_bytes)
    if memory < block_bytes:
        raise SettingsError(f"kv_memory is {memory} bytes; one block of this model takes {block_bytes}")
    return memory // block_bytes


def _facts(settings: RunnerSettings, checkpoint: Checkpoint, blocks: int, block_bytes: int) -> dict[str, Any]:
    config = checkpoint.config
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


def _warm_up(runner: Runner, progress: LoadProgress) -> None:
    """Prefill and decode a throw-away sequence in the still empty cache: the first steps pay for lazy setup."""
    facts = runner.facts
    prompt = [index % facts.vocab_size for index in range(min(facts.block_size, facts.max_context) - 1)] or [0]
    request = Submit(id="warm-up", prompt=prompt, sampling=Sampling(), limits=Limits(max_tokens=_WARM_UP_STEPS))
    sequence = Sequence(request, [*prompt, 0], blocks=[0] * (1 + facts.block_size))
    for step in range(_WARM_UP_STEPS):
        chunk = Chunk(sequence, 0, len(prompt), True) if step == 0 else Chunk(sequence, len(prompt), 1, True)
        runner.run([chunk])
        progress("warm_up", step + 1, _WARM_UP_STEPS)
    runner.forget(sequence)
