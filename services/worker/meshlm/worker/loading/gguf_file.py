"""The GGUF container: metadata and memory-mapped tensors. No torch: the front process reads its tokenizer from here.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read here rather than by `gguf.GGUFReader` because
that takes seconds on a large vocabulary and answers a damaged file with numpy's errors.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from meshlm.worker.loading.errors import ModelFileError

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4

READABLE = frozenset(
    GGMLQuantizationType[name]
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `shape` is in row-major order, as numpy and torch have it."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int  # bytes from the start of the data section


class _Cursor:
    """Reads little-endian values one behind another, and knows when the file ends too soon."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise ModelFileError(
                self.path, f"truncated: {count} bytes wanted at {self.at}, the file has {len(self.data)}"
            )
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner == _ARRAY:  # none of GGUF's keys has one, and a damaged file could nest them without end
                raise ModelFileError(self.path, f"damaged: an array of arrays at byte {self.at}")
            if inner in _SCALARS:
                code = _SCALARS[inner]
                return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelFileError(self.path, f"damaged: metadata type {kind} at byte {self.at} is not one of GGUF's")
        return self.scalar(_SCALARS[kind])


class GgufFile:
    """An open GGUF file. Tensors are read through a memory map and only when asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError: missing, not GGUF, truncated, or of an unreadable version."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            reason = "the file is empty" if isinstance(error, ValueError) else (error.strerror or str(error))
            raise ModelFileError(path, reason) from None
        cursor = _Cursor(path, self._data)
        if cursor.take(4) != _MAGIC:
            raise ModelFileError(path, "not a GGUF file")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise ModelFileError(path, f"GGUF version {version}; versions 2 and 3 can be read")
        tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        infos = [self._tensor_info(cursor) for _ in range(tensors)]
        self.tensors = {info.name: info for info in infos}
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelFileError(path, f"damaged: general.alignment is {alignment!r:.40}, not a power of two")
        self._start = -(-cursor.at // alignment) * alignment
        for info in infos:
            if info.type_id in _known_types():
                self._check_place(info, alignment)

    def _check_place(self, info: TensorInfo, alignment: int) -> None:
        per_block = GGML_QUANT_SIZES[GGMLQuantizationType(info.type_id)][0]
        if info.offset % alignment or info.shape[-1] % per_block:
            where = f"of shape {info.shape} at offset {info.offset}"
            raise ModelFileError(self.path, f"damaged: {info.name} {where} breaks the rules of its type")
        end = self._start + info.offset + self._nbytes(info)
        if end > len(self._data):
            raise ModelFileError(
                self.path, f"truncated: {info.name} ends at byte {end}, the file has {len(self._data)}"
            )

    @staticmethod
    def _tensor_info(cursor: _Cursor) -> TensorInfo:
        name, dimensions = cursor.string(), cursor.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ModelFileError(cursor.path, f"damaged: {name} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise ModelFileError(cursor.path, f"damaged: {name} has the shape {shape}")
        return TensorInfo(name, shape, cursor.scalar("I"), cursor.scalar("Q"))

    @staticmethod
    def _nbytes(info: TensorInfo) -> int:
        per_block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.type_id)]
        return int(math.prod(info.shape) // per_block * block_bytes)

    def require(self, key: str) -> Any:
        """A metadata value. Raises ModelFileError where it is absent."""
        if key not in self.metadata:
            raise ModelFileError(self.path, f"the metadata lacks {key}")
        return self.metadata[key]

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, dequantized where needed. The array may be a read-only view of the file.

        Raises ModelFileError: no such tensor, or of a type that cannot be read.
        """
        info = self.info(name)
        return self.read_rows(name, 0, math.prod(info.shape[:-1])).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Some rows of a tensor, all dimensions but the last taken as one: (stop - start, cols). Else as `read`."""
        raw, kind = self.raw_rows(name, start, stop)
        if kind == GGMLQuantizationType.F32:
            return raw.view(np.float32)
        if kind == GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32)
        return _dequantize(raw, kind)

    def raw_rows(self, name: str, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], GGMLQuantizationType]:
        """As `read_rows`, but the bytes as stored, (stop - start, bytes a row), a read-only view; and their type.

        Raises ModelFileError: no such tensor or rows, or of a type that cannot be read.
        """
        info = self.info(name)
        if info.type_id not in READABLE:
            known = GGMLQuantizationType(info.type_id).name if info.type_id in _known_types() else str(info.type_id)
            raise ModelFileError(self.path, f"{name} has the type {known}, which cannot be read")
        rows = math.prod(info.shape[:-1])
        if not 0 <= start <= stop <= rows:
            raise ModelFileError(self.path, f"{name} has {rows} rows; those from {start} to {stop} are wanted")
        if hasattr(mmap, "MADV_DONTNEED"):  # what was read before need not stay in memory; views find it again
            self._data.madvise(mmap.MADV_DONTNEED)
        row_bytes = self._nbytes(info) // rows
        at = self._start + info.offset + start * row_bytes
        raw = np.frombuffer(self._data, np.uint8, (stop - start) * row_bytes, at)
        return raw.reshape(stop - start, row_bytes), GGMLQuantizationType(info.type_id)

    def info(self, name: str) -> TensorInfo:
        """Raises ModelFileError: no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(self.path, f"the tensor {name} is missing")
        return info


def _known_types() -> frozenset[int]:
    return frozenset(kind.value for kind in GGMLQuantizationType)


def _dequantize(raw: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> npt.NDArray[np.float32]:
    convert: Callable[..., npt.NDArray[np.float32]] = dequantize  # untyped in its package
    return convert(raw, kind).astype(np.float32, copy=False)
