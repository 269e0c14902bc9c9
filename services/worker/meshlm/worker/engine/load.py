"""From settings to a runner that is loaded and warm."""

from __future__ import annotations

from dataclasses import replace

import structlog
import torch

from meshlm.kernels.native.library import Library, NativeUnavailableError, Pool, open_library
from meshlm.kernels.native.ops import Cache, CacheShape
from meshlm.worker.engine.key_scales import key_scales
from meshlm.worker.engine.native_runner import NativeRunner
from meshlm.worker.engine.runner import TorchRunner
from meshlm.worker.engine.sequence import Chunk, Runner, Sequence
from meshlm.worker.engine.settings import (
    LoadProgress,
    RunnerSettings,
    SettingsError,
    model_facts,
    wanted_blocks,
)
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.opening import open_checkpoint
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
SPIN_US = 200  # a thread that waits for the next step spins so long, then sleeps

log = structlog.get_logger()


def load_runner(settings: RunnerSettings, progress: LoadProgress) -> Runner:
    """Read the model, allocate the cache, run the first steps. Raises ModelFileError and SettingsError."""
    _check(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    checkpoint = open_checkpoint(settings.model)
    context = min(settings.max_context or checkpoint.config.max_context, checkpoint.config.max_context)
    checkpoint = replace(checkpoint, config=replace(checkpoint.config, max_context=context))
    runner = _runner(settings, checkpoint, progress)
    _warm_up(runner, progress)
    return runner


def _runner(settings: RunnerSettings, checkpoint: Checkpoint, progress: LoadProgress) -> Runner:
    on_gpu = torch.device(settings.device).type == "cuda"
    if settings.engine == "triton" or (settings.engine == "auto" and on_gpu):
        try:
            from meshlm.worker.engine.gpu_load import gpu_runner  # Triton is not everywhere, and slow to import
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise SettingsError("the triton engine: Triton is not installed; torch for CUDA brings it") from None
        return gpu_runner(settings, checkpoint, progress)
    library = _native_library(settings)
    if library is not None:
        return _native_runner(settings, checkpoint, library, progress)
    if on_gpu:
        log.warning(
            "torch's own kernels run the model on the GPU, as configured: steps are launched one kernel at a time"
        )
    return _torch_runner(settings, checkpoint, progress)


def _check(settings: RunnerSettings) -> None:
    device, size = torch.device(settings.device), settings.block_size
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {settings.device!r}: torch sees no CUDA device")
    if size < 1 or size & (size - 1):
        raise SettingsError(f"block_size {size} is not a power of two")
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
    if settings.quantization == "fp8" or settings.kv_dtype == "fp8":
        raise SettingsError("fp8 needs a GPU: the native engine knows int8 and int4")
    plan = plan_for(settings.quantization, settings.model)
    kv_dtype = "bfloat16" if settings.kv_dtype == "auto" else settings.kv_dtype
    paired = kv_dtype == "bfloat16" and library.pair_products
    layout = "bfloat16_pairs" if paired else kv_dtype
    shape = CacheShape(config.layers, 0, config.kv_heads, settings.block_size, config.head_dim, layout)
    block_bytes = Cache(library, shape).block_bytes * config.layers * config.kv_heads
    blocks = wanted_blocks(settings, config.max_context, block_bytes)
    weights = PackedWeights(
        checkpoint, library, lambda name, rows, cols: quantized_matrix(checkpoint, name, rows, cols, plan)
    )
    decoder = load_decoder(checkpoint, weights, lambda done, total: progress("load", done, total))
    pool = Pool(library, settings.threads or torch.get_num_threads(), SPIN_US)
    scales = key_scales(decoder, library, pool, shape, config.max_context) if kv_dtype == "int4" else None
    cache = Cache(library, replace(shape, blocks=blocks), scales)
    native = NativeDecoder(
        decoder, cache, library, pool, max_rows=settings.step_tokens, max_outputs=settings.max_running
    )
    facts = ModelFacts(
        **model_facts(settings, checkpoint, blocks, block_bytes),
        weight_bytes=native.weight_bytes,
        quantization=plan.name,
        chunk_invariant=True,
        kv_budgets=True,
        kv_dtype=kv_dtype,
        # Part of what makes answers alike to the bit, as the router compares it.
        engine=f"native ({library.isa}{', pairs of bfloat16' if paired else ''})",
    )
    return NativeRunner(native, facts, max_rows=settings.step_tokens, max_outputs=settings.max_running)


def _torch_runner(settings: RunnerSettings, checkpoint: Checkpoint, progress: LoadProgress) -> TorchRunner:
    if settings.quantization in ("int8", "int4", "fp8"):
        raise SettingsError(f"quantization {settings.quantization} needs the native engine or Triton's")
    if settings.kv_dtype not in ("auto", settings.dtype_name):
        raise SettingsError(f"kv_dtype {settings.kv_dtype}: torch's KV cache is of `dtype`, {settings.dtype_name}")
    config, dtype, device = checkpoint.config, _DTYPES[settings.dtype_name], torch.device(settings.device)
    block_bytes = config.kv_bytes_per_token(dtype.itemsize) * settings.block_size
    blocks = wanted_blocks(settings, config.max_context, block_bytes)
    decoder = load_decoder(
        checkpoint, DenseWeights(checkpoint, device, dtype), lambda done, total: progress("load", done, total)
    )
    model = TorchDecoder(decoder)
    facts = ModelFacts(
        **model_facts(settings, checkpoint, blocks, block_bytes),
        weight_bytes=model.weight_bytes,
        quantization="none",
        kv_dtype=settings.dtype_name,
        engine="torch",
    )
    return TorchRunner(model, facts, dtype, device)


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
