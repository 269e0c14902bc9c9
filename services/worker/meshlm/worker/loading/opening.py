"""A model on disk, whatever its format."""

from __future__ import annotations

from pathlib import Path

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.gguf import open_gguf
from meshlm.worker.loading.hugging_face import open_folder


def open_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder. Raises ModelFileError."""
    return open_folder(path) if path.is_dir() else open_gguf(path)
