"""Weight matrices as the GPU's products read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

WeightFormat = Literal["int4", "int8", "fp8"]

SPAN = 64  # columns of 4-bit codes that are packed together


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A weight (rows, cols): `scale * code`, or `scale * code + minimum` where there are minimums.

    codes:
        int4: (rows, cols / 2) uint8. Byte 32 s + j holds column 64 s + j in its low and column 64 s + 32 + j in its
            high four bits, so that each half of a span is one run of columns. Unsigned; without minimums 8 stands for
            0. Columns are padded to whole spans with weights of 0.
        int8: (rows, cols) int8, signed.
        fp8: (rows, cols) float8_e4m3fn.
    scales: int4 and int8: (groups, rows) float16, a group being `group` columns beside one another (32, 64, 128, or for
        int8 all of them); fp8: (rows,) or () float32.
    minimums: (groups, rows) float16, int4 only.
    cols: those of the weight, without padding.
    """

    format: WeightFormat
    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None
    group: int
    cols: int

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.minimums) if part is not None)


Matrix = torch.Tensor | QuantizedMatrix  # a dense weight, (rows, cols), or a quantized one
