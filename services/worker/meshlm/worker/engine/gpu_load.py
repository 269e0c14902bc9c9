"""From settings to a runner on a GPU, or under Triton's interpreter on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import cast

import structlog
import torch

from meshlm.kernels.gpu.dot import INTERPRETED
from meshlm.kernels.gpu.kv_cache import FLOATS, KvFormat, bytes_per_token
from meshlm.worker.engine.gpu_memory import MemoryNeeds, measure_needs
from meshlm.worker.engine.gpu_runner import GpuRunner
from meshlm.worker.engine.gpu_steps import GpuSteps
from meshlm.worker.engine.gpu_warm_up import chunk_of, spread, warm_up, watch_for_compilation
from meshlm.worker.engine.settings import LoadProgress, RunnerSettings, SettingsError, model_facts, wanted_blocks
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.messages import ModelFacts
from meshlm.worker.models.gpu_decoder import GpuDecoder, GpuWeights
from meshlm.worker.models.registry import load_decoder
from meshlm.worker.quantization.on_gpu import MatricesOnGpu

log = structlog.get_logger()


def gpu_runner(settings: RunnerSettings, checkpoint: Checkpoint, progress: LoadProgress) -> GpuRunner:
    """Raises ModelFileError and SettingsError."""
    device = _device(settings)
    _check(settings, device)
    try:
        return _load(settings, checkpoint, progress, device)
    except torch.OutOfMemoryError:
        raise SettingsError(f"the memory of {device} gave out while the model was loaded; {_held(device)}") from None


def _held(device: torch.device) -> str:
    """Who has how much of a device's memory."""
    if device.type != "cuda":
        return "it is the host's"
    (free, total), ours = torch.cuda.mem_get_info(device), torch.cuda.memory_reserved(device)
    return f"of {total} bytes this process holds {ours}, others {max(0, total - free - ours)}"


def _load(settings: RunnerSettings, checkpoint: Checkpoint, progress: LoadProgress, device: torch.device) -> GpuRunner:
    dtype = FLOATS[settings.dtype_name]
    matrices = MatricesOnGpu.planned(checkpoint, settings.model, settings.quantization, device, dtype)
    weights = GpuWeights(checkpoint, device, matrices.matrix)
    model = GpuDecoder(
        load_decoder(checkpoint, weights, lambda done, total: progress("load", done, total)), dtype, device
    )
    kv_format = cast("KvFormat", settings.dtype_name if settings.kv_dtype == "auto" else settings.kv_dtype)
    config = checkpoint.config
    block_bytes = bytes_per_token(kv_format, config.kv_heads, config.head_dim) * config.layers * settings.block_size

    def facts(blocks: int) -> ModelFacts:
        return ModelFacts(
            **model_facts(settings, checkpoint.config, blocks, block_bytes),
            weight_bytes=model.weight_bytes,
            quantization=matrices.name,
            kv_dtype=kv_format,
            engine=f"triton ({'interpreted' if device.type == 'cpu' else torch.cuda.get_device_name(device)})",
            looks_ahead=True,
        )

    known = facts(_blocks(settings, model, facts, kv_format, block_bytes))
    steps = GpuSteps(model, known, kv_format, settings.max_running)
    steps.capture(lambda done, total: progress("capture", done, total))
    if device.type == "cuda":
        warm_up(steps, known, settings.step_tokens)
        watch_for_compilation()
    return GpuRunner(steps, known)


def _device(settings: RunnerSettings) -> torch.device:
    """With its number, and made the current one: launches, events and graphs are of the current device."""
    device = torch.device(settings.device)
    if device.type != "cuda":
        return device
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check(settings: RunnerSettings, device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED.value:
        raise SettingsError("the triton engine runs on a CPU only where TRITON_INTERPRET=1 is set; it is for tests")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise SettingsError("the triton engine needs compute capability 8.0 (Ampere) or newer")
    fp8 = "fp8" in (settings.quantization, settings.kv_dtype)
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise SettingsError("fp8 needs compute capability 8.9 (Ada) or newer")


def _blocks(
    settings: RunnerSettings,
    model: GpuDecoder,
    facts: Callable[[int], ModelFacts],
    kv_format: KvFormat,
    block_bytes: int,
) -> int:
    """How many blocks the cache gets. On a GPU, unless the settings say it, what measured needs leave."""
    context = model.config.max_context
    if model.device.type == "cpu" or settings.kv_blocks is not None or settings.kv_memory is not None:
        return wanted_blocks(settings, context, block_bytes)
    needs = _needs(settings, model, facts(1), kv_format)
    gc.collect()  # steps and their graphs know each other, and capturing does not collect
    torch.cuda.empty_cache()
    blocks = max(0, needs.left(settings.gpu_fraction)) // block_bytes
    log.info("device memory", **{name: getattr(needs, name) for name in needs.__slots__}, kv_blocks=blocks)
    if blocks < 1:
        raise SettingsError(
            f"no room for the KV cache: of {needs.total} bytes, {settings.gpu_fraction:.0%} may be used, and weights "
            f"({needs.taken}), a step ({needs.activations}) and its graphs ({needs.graphs}) take them"
        )
    return min(blocks, _most_useful(settings, context))


def _needs(settings: RunnerSettings, model: GpuDecoder, facts: ModelFacts, kv_format: KvFormat) -> MemoryNeeds:
    """Measured with a cache of one block, which is gone afterwards."""
    steps = GpuSteps(model, facts, kv_format, settings.max_running)
    needs = measure_needs(
        lambda: _largest_step(steps, facts, settings), lambda: steps.capture(lambda done, total: None), model.device
    )
    steps.release()
    return needs


def _most_useful(settings: RunnerSettings, context: int) -> int:
    """Blocks for `max_running` texts of the whole context, and as many again for cached prefixes."""
    return 2 * settings.max_running * -(-context // settings.block_size)


def _largest_step(steps: GpuSteps, facts: ModelFacts, settings: RunnerSettings) -> None:
    """The most rows in the most sequences, a token drawn behind each; all in one block of the cache."""
    counts = spread(settings.step_tokens, settings.max_running, facts.max_context)
    steps.mixed([chunk_of(facts, 0, count) for count in counts]).sampled()
