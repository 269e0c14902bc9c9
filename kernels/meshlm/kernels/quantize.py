"""Weights in groups of 32 columns, each with a scale and perhaps a minimum: what quantized products read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP = 32  # columns that share a scale


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """A weight (rows, cols), cols a multiple of GROUP, as unsigned codes: `w = scale * code + minimum`.

    codes: (rows, cols) uint8, below 2 ** bits; scales: (rows, cols / GROUP) float16; minimums: as scales, or None for
    symmetric weights, whose minimum is `-scale * 2 ** (bits - 1)`.
    """

    bits: int  # 4 or 8; 8-bit weights are symmetric
    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    @property
    def packed_bytes(self) -> int:
        """Bytes of these weights as kernels read them."""
        rows, cols = self.shape
        per_group = GROUP * self.bits // 8 + 2 * (1 if self.minimums is None else 2)
        return rows * (cols // GROUP) * per_group

    def rows(self, start: int, stop: int) -> GroupQuantized:
        """Some of the rows, as views."""
        minimums = None if self.minimums is None else self.minimums[start:stop]
        return GroupQuantized(self.bits, self.codes[start:stop], self.scales[start:stop], minimums)


def dequantize(weight: GroupQuantized) -> torch.Tensor:
    """The weight as float32: (rows, cols)."""
    rows, cols = weight.shape
    scales = weight.scales.float().unsqueeze(-1)
    codes = weight.codes.view(rows, cols // GROUP, GROUP).float()
    if weight.minimums is None:
        return (scales * (codes - 2 ** (weight.bits - 1))).view(rows, cols)
    return (scales * codes + weight.minimums.float().unsqueeze(-1)).view(rows, cols)
