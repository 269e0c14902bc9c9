"""From settings to a runner that is loaded and warm, in this process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import structlog
import torch

from meshlm.kernels.native.library import Library
from meshlm.kernels.native.packed import PackedMatrix
from meshlm.worker.engine.native_load import native_library, native_runner, warm_up
from meshlm.worker.engine.runner import TorchRunner
from meshlm.worker.engine.sequence import Runner
from meshlm.worker.engine.settings import LoadProgress, RunnerSettings, SettingsError, model_facts, wanted_blocks
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.opening import open_checkpoint
from meshlm.worker.messages import ModelFacts
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress
from meshlm.worker.models.dense_weights import DenseWeights
from meshlm.worker.models.packed_weights import PackedWeights
from meshlm.worker.models.registry import load_decoder
from meshlm.worker.models.torch_decoder import TorchDecoder
from meshlm.worker.quantization.cache import plan_for
from meshlm.worker.quantization.plan import Plan, quantized_matrix

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = structlog.get_logger()


def load_runner(settings: RunnerSettings, progress: LoadProgress) -> Runner:
    """Read the model, allocate the cache, run the first steps. Raises ModelFileError and SettingsError."""
    library = native_library(settings)
    if library is None:
        return load_torch_runner(settings, progress)
    return native_runner(settings, OpenedModel.of(settings, library), library, progress)


def load_torch_runner(settings: RunnerSettings, progress: LoadProgress) -> Runner:
    """As `load_runner`, where `native_library` gave none: on a GPU, or by torch's own kernels."""
    device = torch.device(settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device {settings.device!r}: torch sees no CUDA device")
    checkpoint = checkpoint_of(settings)
    on_gpu = device.type == "cuda"
    if settings.engine == "triton" or (settings.engine == "auto" and on_gpu):
        try:
            from meshlm.worker.engine.gpu_load import gpu_runner  # Triton is not everywhere, and slow to import
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise SettingsError("the triton engine: Triton is not installed; torch for CUDA brings it") from None
        runner = gpu_runner(settings, checkpoint, progress)
        warm_up(runner, progress)
        return runner
    if on_gpu:
        log.warning(
            "torch's own kernels run the model on the GPU, as configured: steps are launched one kernel at a time"
        )
    return _torch_runner(settings, checkpoint, progress)


def checkpoint_of(settings: RunnerSettings) -> Checkpoint:
    """The model, opened; and torch told how many threads it has. Raises ModelFileError."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    checkpoint = open_checkpoint(settings.model)
    context = min(settings.max_context or checkpoint.config.max_context, checkpoint.config.max_context)
    return replace(checkpoint, config=replace(checkpoint.config, max_context=context))


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A `NativeSource` in this process."""

    checkpoint: Checkpoint
    plan: Plan
    library: Library
    threads: int

    @classmethod
    def of(cls, settings: RunnerSettings, library: Library) -> OpenedModel:
        """Raises ModelFileError."""
        checkpoint = checkpoint_of(settings)
        plan = plan_for(settings.quantization, settings.model)
        return cls(checkpoint, plan, library, settings.threads or torch.get_num_threads())

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def quantization(self) -> str:
        return self.plan.name

    @property
    def weights(self) -> PackedWeights:
        """What `decoder` reads."""
        return PackedWeights(
            self.checkpoint,
            self.library,
            lambda name, rows, cols: quantized_matrix(self.checkpoint, name, rows, cols, self.plan),
        )

    def decoder(self, progress: Progress) -> Decoder[PackedMatrix]:
        return load_decoder(self.checkpoint, self.weights, progress)


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
        **model_facts(settings, checkpoint.config, blocks, block_bytes),
        weight_bytes=model.weight_bytes,
        quantization="none",
        kv_dtype=settings.dtype_name,
        engine="torch",
    )
    runner = TorchRunner(model, facts, dtype, device)
    warm_up(runner, progress)
    return runner
