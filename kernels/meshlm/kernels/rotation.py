"""Rotations that spread outliers over many elements, so that int8 has room for the rest (QuaRot, arXiv:2404.00456).

A product is unchanged when its input and its weight are turned by the same orthogonal matrix; its rounding error is
not.
"""

from __future__ import annotations

import torch

GROUP = 128  # elements that `rotate_groups` mixes; the largest power of two that is cheap and divides the usual widths


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's construction, orthogonal and symmetric: (size, size) float64, `size` a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    scaled: torch.Tensor = matrix / size**0.5
    return scaled


def random_rotation(size: int, seed: int = 0) -> torch.Tensor:
    """Random signs, then a Hadamard matrix times (Kronecker) a random rotation of the odd rest: (size, size)
    float64.
    """
    generator = torch.Generator().manual_seed(seed)
    even = size & -size
    odd = size // even
    mixed = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))[0]
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return signs * torch.kron(hadamard(even), mixed.contiguous())


def group_size(width: int) -> int:
    """The largest power of two up to GROUP that divides `width`."""
    return min(GROUP, width & -width)


def rotate_groups(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Turn each run of `len(matrix)` elements of the last dimension: (..., width), a new tensor of the same shape.

    matrix: (group, group), symmetric, of x's dtype; `width` is a multiple of `group`.
    """
    return (x.reshape(-1, matrix.shape[0]) @ matrix).view(x.shape)


def reference_rotate_groups(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """One group after the other, in float64."""
    group = matrix.shape[0]
    parts = [part.double() @ matrix.double() for part in torch.split(x, group, dim=-1)]
    return torch.cat(parts, -1).to(x.dtype)
