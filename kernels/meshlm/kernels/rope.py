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


def scale_yarn(
    frequencies: torch.Tensor, theta: float, factor: float, low_turns: float, high_turns: float, original_context: int
) -> torch.Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): as Llama 3.1's, but blended evenly over the elements of a head.

    Frequencies below `low_turns` turns within `original_context` positions are divided by `factor`, those above
    `high_turns` are kept; the borders are rounded outwards to whole elements.
    """
    size = 2 * len(frequencies)

    def element(turns: float) -> float:
        return size * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(element(high_turns)), 0), min(math.ceil(element(low_turns)), size - 1)
    ramp = (torch.arange(len(frequencies)).float() - first) / max(last - first, 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / factor * stretched


def rope_turns(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines for `rope`, each (tokens, 1, rotated), multiplied by `factor`.

    frequencies: (rotated / 2,) float32; positions: (tokens,) int64. Angles are computed in float64.
    The sine of the first half is negated, so that `rope` needs a roll and no negation.
    """
    angles = positions.double().unsqueeze(1) * frequencies.double()
    cos, sin = angles.cos() * factor, angles.sin() * factor
    turns = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).unsqueeze(2).to(dtype)
    return turns[0], turns[1]


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads by their token's position, in place.

    x: (tokens, heads, rotated), a view of heads that may be longer; cos, sin: (tokens, 1, rotated), see `rope_turns`.
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
