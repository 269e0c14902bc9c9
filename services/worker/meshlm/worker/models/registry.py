"""Which class runs which architecture."""

from __future__ import annotations

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.models.layers import Model, Placement, Progress
from meshlm.worker.models.llama import Llama

ARCHITECTURES = {"llama": Llama}


def load_model(checkpoint: Checkpoint, placement: Placement, progress: Progress) -> Model:
    """Raises ModelFileError."""
    architecture = checkpoint.config.architecture
    if architecture not in ARCHITECTURES:
        raise ModelFileError(
            checkpoint.path, f"the architecture {architecture!r} is unknown; known: {sorted(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture](checkpoint, placement, progress)
