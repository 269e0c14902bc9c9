"""A weight as the native products read it (`src/matrix.h`): its memory, with no torch. `matrix.py` fills it."""

from __future__ import annotations

import ctypes
import enum

from meshlm.kernels.native import structures
from meshlm.kernels.native.memory import Arena

BLOCK = 16  # rows that lie together
_GROUP = 32  # columns that share a scale


class Format(enum.IntEnum):
    """How a weight is kept; the numbers are those of `src/matrix.h`."""

    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3
    Q4M = 4


_GROUP_BYTES = {Format.Q8: 544, Format.Q4: 288, Format.Q4M: 320}  # of BLOCK rows
_ITEM_BYTES = {Format.F32: 4, Format.BF16: 2}


class PackedMatrix:
    """A weight (rows, cols) in native memory, which lives as long as this object.

    handle: the structure that native functions take; copies of it are valid as long as this object lives.
    """

    def __init__(self, form: Format, rows: int, cols: int, arena: Arena) -> None:
        """Memory for the matrix, all zeros."""
        self.format = form
        self.rows = rows
        self.cols = cols
        blocks = -(-rows // BLOCK)
        if form in _ITEM_BYTES:
            self.nbytes = blocks * BLOCK * cols * _ITEM_BYTES[form]
        else:
            self.nbytes = blocks * (cols // _GROUP) * _GROUP_BYTES[form]
        self._memory = arena.allocate(self.nbytes)
        self.handle = structures.Matrix(form, rows, cols, 0, ctypes.addressof(self._memory))

    @property
    def memory(self) -> memoryview:
        """Its bytes as they lie there, to be written once: `native_pack` of `src/pack.cpp` knows their order."""
        return memoryview(self._memory).cast("B")

    def __repr__(self) -> str:
        return f"PackedMatrix({self.format.name}, {self.rows} x {self.cols})"
