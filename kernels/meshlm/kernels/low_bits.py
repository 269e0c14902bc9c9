"""Weights in few bits, as they are defined: what the GPU's quantizers are compared with. All in float64.

`quantize.py` has the search for the scales of groups, which is its own reference.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# The levels of 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314, appendix E): each holds an equal share of a
# normal distribution that its largest magnitude scales to 1, and 0 is one of them.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_GROUP = 64  # columns that share a scale
NF4_BLOCK = 256  # scales that share a scale
LARGEST_FP8 = 448.0  # of e4m3


def reference_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, cols) from -127 to 127, and scales (rows,), the largest magnitude of a row being 127, as float16
    holds it."""
    scales = (weight.double().abs().amax(1) / 127).half().double()
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return (weight.double() * inverse[:, None]).round().clamp(-127, 127), scales


def reference_fp8(weight: torch.Tensor, per_tensor: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, cols) of E4M3's values, and scales (rows,), the largest magnitude of a row, or of all, being 448."""
    largest = weight.double().abs().amax(1)
    if per_tensor:
        largest = largest.amax().expand(len(weight))
    scales = torch.where(largest == 0, 1.0, largest / LARGEST_FP8)
    # Rounded by hand: three bits behind the leading one, but none below 2 ** -9.
    scaled = weight.double() / scales[:, None]
    step = torch.exp2(scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return ((scaled / step).round() * step).clamp(-LARGEST_FP8, LARGEST_FP8), scales


def reference_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What 4-bit NormalFloat with double quantization holds of a weight (rows, cols).

    The scale of 64 columns is their largest magnitude; of the scales, in the order of groups and then rows, the mean is
    taken off, and each 256 are integers of 8 bits with a scale of their own, where the paper has floats of 8 bits.
    """
    rows, cols = weight.shape
    groups = -(-cols // NF4_GROUP)
    x = functional.pad(weight.double(), (0, groups * NF4_GROUP - cols)).view(rows, groups, NF4_GROUP)
    scales = x.abs().amax(-1).T.flatten()
    mean = scales.mean()
    blocks = functional.pad(scales - mean, (0, -len(scales) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / 127
    codes = torch.where(step == 0, 0.0, blocks / step).round()
    held = ((codes * step).flatten()[: len(scales)] + mean).view(groups, rows).T.unsqueeze(-1)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64, device=weight.device)
    ratio = torch.where(held == 0, 0.0, x / held)
    nearest = levels[(ratio.unsqueeze(-1) - levels).abs().argmin(-1)]
    return (nearest * held).view(rows, -1)[:, :cols]
