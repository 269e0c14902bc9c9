"""From settings and a model's weights to a native runner that is warm, with no torch: `load.py` or, in an engine, the
loading process (`loaded.py`) has the weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import structlog

from meshlm.kernels.native.cache import Cache, CacheShape
from meshlm.kernels.native.library import Library, NativeUnavailableError, Pool, open_library
from meshlm.kernels.native.packed import PackedMatrix
from meshlm.worker.engine.key_scales import key_scales
from meshlm.worker.engine.native_runner import NativeRunner
from meshlm.worker.engine.sequence import Chunk, Runner, Sequence
from meshlm.worker.engine.settings import LoadProgress, RunnerSettings, SettingsError, model_facts, wanted_blocks
from meshlm.worker.messages import Limits, ModelFacts, Sampling, Submit
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress
from meshlm.worker.models.native_decoder import NativeDecoder

_WARM_UP_STEPS = 3
NATIVE_BLOCK = 16  # tokens; native blocks are multiples of it
MOST_EXPERTS = 256  # of a layer: `Decoder::route` in native/src/step.cpp keeps their logits on the stack
SPIN_US = 200  # a thread that waits for the next step spins so long, then sleeps

log = structlog.get_logger()


class NativeSource(Protocol):
    """A model that was opened and not yet read."""

    @property
    def config(self) -> ModelConfig:
        """With `max_context` as the settings have it."""
        ...

    @property
    def quantization(self) -> str:
        """The name of the plan by which weights are packed."""
        ...

    @property
    def threads(self) -> int:
        """Of a step."""
        ...

    def decoder(self, progress: Progress) -> Decoder[PackedMatrix]:
        """Reads it. Raises ModelFileError."""
        ...


def native_library(settings: RunnerSettings) -> Library | None:
    """The native kernels, or None where something else is to run the model. Raises SettingsError where they were asked
    for in vain, or for what they cannot do: before anything is read."""
    size, on_cpu = settings.block_size, settings.device.partition(":")[0] == "cpu"
    if size < 1 or size & (size - 1):
        raise SettingsError(f"block_size {size} is not a power of two")
    if settings.engine == "native" and not on_cpu:
        raise SettingsError(f"the native engine runs on CPUs only, not on {settings.device!r}")
    if settings.engine in ("torch", "triton") or not on_cpu:
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
    if size % NATIVE_BLOCK:
        raise SettingsError(f"block_size {size}: the native engine wants multiples of {NATIVE_BLOCK}")
    if settings.quantization == "fp8" or settings.kv_dtype == "fp8":
        raise SettingsError("fp8 needs a GPU: the native engine knows int8 and int4")
    return library


def native_runner(
    settings: RunnerSettings, source: NativeSource, library: Library, progress: LoadProgress
) -> NativeRunner:
    """Takes the model from `source`, allocates the cache, runs the first steps.

    Raises SettingsError, and what `source` raises.
    """
    config = source.config
    if config.experts > MOST_EXPERTS:
        raise SettingsError(
            f"the native engine knows up to {MOST_EXPERTS} experts, and this model has {config.experts}"
        )
    kv_dtype = "bfloat16" if settings.kv_dtype == "auto" else settings.kv_dtype
    paired = kv_dtype == "bfloat16" and library.pair_products
    layout = "bfloat16_pairs" if paired else kv_dtype
    shape = CacheShape(config.layers, 0, config.kv_heads, settings.block_size, config.head_dim, layout)
    block_bytes = Cache(library, shape).block_bytes * config.layers * config.kv_heads
    blocks = wanted_blocks(settings, config.max_context, block_bytes)
    decoder = source.decoder(lambda done, total: progress("load", done, total))
    pool = Pool(library, source.threads, SPIN_US)
    scales = key_scales(decoder, library, pool, shape, config.max_context) if kv_dtype == "int4" else None
    # Touched now: a step that first touches a block would wait for 2 MB of zeros in every layer, 0.1 s in all.
    cache = Cache(library, replace(shape, blocks=blocks), scales, fill=0)
    native = NativeDecoder(
        decoder, cache, library, pool, max_rows=settings.step_tokens, max_outputs=settings.max_running
    )
    facts = ModelFacts(
        **model_facts(settings, config, blocks, block_bytes),
        weight_bytes=native.weight_bytes,
        quantization=source.quantization,
        chunk_invariant=True,
        kv_budgets=True,
        kv_dtype=kv_dtype,
        # Part of what makes answers alike to the bit, as the router compares it.
        engine=f"native ({library.isa}{', pairs of bfloat16' if paired else ''})",
    )
    runner = NativeRunner(native, facts, max_rows=settings.step_tokens, max_outputs=settings.max_running)
    warm_up(runner, progress)
    return runner


def warm_up(runner: Runner, progress: LoadProgress) -> None:
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
