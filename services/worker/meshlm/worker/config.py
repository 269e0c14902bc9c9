"""Configuration of a worker (section `worker`)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from meshlm.chassis.config import ServerConfig
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.fake import FakeSettings

_RUNNER_FIELDS = (
    "engine",
    "quantization",
    "kv_dtype",
    "device",
    "dtype",
    "gpu_fraction",
    "threads",
    "max_context",
    "kv_memory",
    "kv_blocks",
    "block_size",
)


# Tokens of a block where nothing is said.
CPU_BLOCK = 16
GPU_BLOCK = 64


def default_cache_dir() -> Path:
    """`meshlm/digests` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "meshlm" / "digests"


@dataclass(frozen=True)
class WorkerConfig:
    """A worker: one model on one device."""

    server: ServerConfig = field(
        default_factory=lambda: ServerConfig(listen="127.0.0.1:50061", admin_listen="127.0.0.1:50062")
    )
    # Name of the replica, unique in the mesh.
    name: str = "worker"
    # Region it runs in.
    region: str = "local"
    # Name under which the model is asked for; empty: the name of its file or folder.
    model: str = ""
    # A GGUF file or a Hugging Face folder; none only for the fake engine.
    model_path: Path | None = None
    # Folder that keeps digests of model files, so that they are read for it once.
    cache_dir: Path = field(default_factory=default_cache_dir)
    # What computes. `auto`: the native kernels on a CPU (torch where they could not be built), Triton's on a GPU.
    # `fake` makes letters without a model: for tests of everything around one.
    engine: Literal["auto", "native", "torch", "triton", "fake"] = "auto"
    # Weights. `auto`: a GGUF file's own blocks, and for float weights the fewest bits within a bound on quality (on a
    # GPU only where that was measured), see docs/quantization.md. `int8`, `int4` and on a GPU `fp8` are for all; `none`
    # keeps the file's floats.
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = "auto"
    # KV cache. `auto`: bfloat16 natively, else `dtype`. `fp8`: on a GPU.
    kv_dtype: Literal["auto", "float32", "bfloat16", "fp8", "int8", "int4"] = "auto"
    # Where the model runs, as torch names it: cpu, cuda, cuda:1.
    device: str = "cpu"
    # Type of weights and activations. `auto`: bfloat16 on a GPU, else float32, which the native engine always has.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Share of a GPU's memory to fill: what weights and steps leave of it becomes KV cache, where nothing else is said.
    gpu_fraction: float = 0.9
    # Threads of a step; unset: the physical cores.
    threads: int | None = None
    # Most tokens of input and answer together; unset: the model's own limit.
    max_context: int | None = None
    # Bytes of KV cache; unset: what `gpu_fraction` leaves; on a CPU what a text of `max_context` tokens needs, at most
    # 1 GiB.
    kv_memory: int | None = None
    # Blocks of KV cache; where set, it wins over `kv_memory`.
    kv_blocks: int | None = None
    # Tokens of a block, a power of two; unset: 16, on a GPU 64: its fastest prefill wants a tile of keys in one block.
    block_size: int | None = None
    # How much is done at once.
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    # Seconds between two messages of a stream where 16 or more run, but for its first and last token: what is made
    # meanwhile goes into one message. With fewer streams less, down to a quarter of it. 0: a message a token.
    stream_interval: float = 0.1
    # Most tokens of all texts of one Score or Embed.
    max_read_tokens: int = 65536
    # Seconds without a step, with work to do, after which the engine is killed and started again: more than the longest
    # step takes, which is a prefill of `scheduler.step_tokens`.
    hang_seconds: float = 30.0
    # Seconds without progress after which a loading engine is killed.
    load_seconds: float = 600.0
    # The fake engine's size and pace.
    fake: FakeSettings = field(default_factory=FakeSettings)

    def __post_init__(self) -> None:
        if self.engine != "fake" and self.model_path is None:
            raise ValueError("model_path is required")
        if self.stream_interval < 0:
            raise ValueError("stream_interval must be at least 0")
        if self.hang_seconds <= 0 or self.load_seconds <= 0:
            raise ValueError("hang_seconds and load_seconds must be above 0")
        if self.max_read_tokens < 1:
            raise ValueError("max_read_tokens must be at least 1")
        if self.block_size is not None and (self.block_size < 1 or self.block_size & (self.block_size - 1)):
            raise ValueError("block_size must be a power of two")
        if any(count is not None and count < 1 for count in (self.kv_memory, self.kv_blocks, self.threads)):
            raise ValueError("kv_memory, kv_blocks and threads must be at least 1")
        if not 0 < self.gpu_fraction <= 1:
            raise ValueError("gpu_fraction must be above 0 and at most 1")
        if self.max_context is not None and self.max_context < 2:
            raise ValueError("max_context must be at least 2: a token of input and one of answer")

    @property
    def model_name(self) -> str:
        if self.model or self.model_path is None:
            return self.model or "fake"
        return self.model_path.stem if self.model_path.suffix == ".gguf" else self.model_path.name

    @property
    def runner(self) -> dict[str, Any]:
        """What the engine process is given: the fields of RunnerSettings or FakeSettings."""
        if self.engine == "fake":
            fields: dict[str, Any] = msgspec.to_builtins(self.fake)
            return fields
        own = {name: getattr(self, name) for name in _RUNNER_FIELDS}
        if self.block_size is None:
            own["block_size"] = GPU_BLOCK if self.device.startswith("cuda") else CPU_BLOCK
        steps = {"step_tokens": self.scheduler.step_tokens, "max_running": self.scheduler.max_running}
        return {"model": str(self.model_path)} | own | steps
