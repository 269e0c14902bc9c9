"""The seam between file formats and models: a config, and tensors by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk. Tensors are read one at a time, so that a load never holds the model twice."""

    path: Path
    config: ModelConfig
    names: Set[str]  # as in a Hugging Face state dict: "model.layers.0.self_attn.q_proj.weight"
    read: Callable[[str], torch.Tensor]  # on the CPU, in the file's float type (float32 for quantized GGUF)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Raises ModelFileError: missing, or of another shape than asked for."""
        if name not in self.names:
            raise ModelFileError(self.path, f"the tensor {name} is missing")
        found = self.read(name)
        if tuple(found.shape) != shape:
            raise ModelFileError(self.path, f"{name} has the shape {tuple(found.shape)}; the config asks for {shape}")
        return found


def open_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder. Raises ModelFileError."""
    from meshlm.worker.loading import gguf, hugging_face

    if path.is_dir():
        return hugging_face.open_folder(path)
    return gguf.open_gguf(path)
