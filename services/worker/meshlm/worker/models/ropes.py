"""The rotary positions that a config asks for."""

from __future__ import annotations

import torch

from meshlm.kernels.rope import rope_frequencies, scale_linear, scale_llama3, scale_yarn
from meshlm.worker.models.config import ModelConfig, RopeScaling
from meshlm.worker.models.decoder import Rope


def scaled_rope(config: ModelConfig) -> Rope:
    """With the config's scaling. Which of longrope's two sets of divisors is taken depends on the context served, for
    keys in the cache cannot be turned anew when a text passes `original_context` (as in vLLM and llama.cpp).
    """
    size, scaling = config.rotary_dim or config.head_dim, config.rope_scaling
    base = rope_frequencies(size, config.rope_theta)
    if scaling is None:
        return Rope(base)
    return Rope(_scaled(base, scaling, config, size), scaling.attention_factor)


def local_rope(config: ModelConfig) -> Rope:
    """Of layers with a window, in models that give these a base of their own."""
    return Rope(rope_frequencies(config.rotary_dim or config.head_dim, config.local_rope_theta or config.rope_theta))


def _scaled(base: torch.Tensor, scaling: RopeScaling, config: ModelConfig, size: int) -> torch.Tensor:
    match scaling.kind:
        case "linear":
            return scale_linear(base, scaling.factor)
        case "divisors":
            return base / torch.tensor(scaling.divisors)
        case "longrope":
            long = config.max_context > scaling.original_context
            return base / torch.tensor(scaling.long if long else scaling.short)
        case "yarn":
            turns = (scaling.low_frequency, scaling.high_frequency)
            return scale_yarn(base, config.rope_theta, scaling.factor, *turns, scaling.original_context)
        case "llama3":
            turns = (scaling.low_frequency, scaling.high_frequency)
            return scale_llama3(base, scaling.factor, *turns, scaling.original_context)
