"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split form of Hugging Face models."""

from __future__ import annotations

import math

import torch


def rope_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """Radians a position for each rotated pair: (head_dim / 2,) float32."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def scale_linear(frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): positions are divided by `factor`."""
    return frequencies / factor


def scale_llama3(
    frequencies: torch.Tensor, factor: float, low_frequency: float, high_frequency: float, original_context: int
) -> torch.Tensor:
    """Llama 3.1's scaling: long waves are stretched by `factor`, short ones kept, those between blended.

    `low_frequency` and `high_frequency` count turns within `original_context` positions.
    """
    turns = original_context * frequencies / (2 * math.pi)
    kept = ((turns - low_frequency) / (high_frequency - low_frequency)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rope_table(frequencies: torch.Tensor, positions: int, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and signed sines of every position: (2, positions, 1, head_dim).

    The sine of the first half is negated, so that `rope` needs a roll and no negation.
    """
    angles = torch.arange(positions).double().unsqueeze(1) * frequencies.double()
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).unsqueeze(2).to(dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads by their token's position, in place.

    x: (tokens, heads, head_dim); cos, sin: (tokens, 1, head_dim), rows of `rope_table` at the tokens' positions.
    """
    torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, out=x)


def reference_rope(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Each pair (x[i], x[i + half]) turned by position * frequency[i], as a complex product in float64.

    x: (tokens, heads, head_dim); positions: (tokens,); frequencies: (head_dim / 2,).
    """
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    angles = positions.double()[:, None, None] * frequencies.double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)
