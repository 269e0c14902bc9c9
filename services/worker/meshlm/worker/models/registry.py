"""Which file loads which architecture."""

from __future__ import annotations

from typing import Protocol, TypeVar

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.models import gemma3, llama, mistral, mixtral, phi3, qwen2, qwen3
from meshlm.worker.models.config import ModelConfig
from meshlm.worker.models.decoder import Decoder, Progress, Weights

W = TypeVar("W")


class Loader(Protocol):
    def __call__(self, config: ModelConfig, weights: Weights[W], progress: Progress) -> Decoder[W]: ...


LOADERS: dict[str, Loader] = {
    "gemma3": gemma3.load,
    "llama": llama.load,
    "mistral": mistral.load,
    "mixtral": mixtral.load,
    "phi3": phi3.load,
    "qwen2": qwen2.load,
    "qwen3": qwen3.load,
}


def load_decoder(checkpoint: Checkpoint, weights: Weights[W], progress: Progress) -> Decoder[W]:
    """`weights` are the checkpoint's, as the one who runs the decoder wants them. Raises ModelFileError."""
    architecture = checkpoint.config.architecture
    if architecture not in LOADERS:
        raise ModelFileError(checkpoint.path, f"the architecture {architecture!r} is unknown; known: {sorted(LOADERS)}")
    return LOADERS[architecture](checkpoint.config, weights, progress)
