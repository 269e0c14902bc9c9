"""GGUF's quantized blocks as groups of 32 columns, without a detour through floats.

Block layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. All but Q4_K are taken over exactly;
Q4_K's scales and minimums are products of an fp16 and a 6-bit number, which fp16 rounds (relative 2**-11). Q5_1, Q5_K
and Q6_K have no such form: they need five bits with a minimum, or a scale for each 16 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType

from meshlm.kernels.quantize import GROUP, GroupQuantized

Bytes = npt.NDArray[np.uint8]
_Arrays = tuple[Bytes, npt.NDArray[np.float16], npt.NDArray[np.float16] | None]  # codes, scales, minimums


def group_quantized(raw: Bytes, kind: GGMLQuantizationType) -> GroupQuantized | None:
    """raw: (rows, bytes a row). None where the type has no exact form in groups."""
    if kind not in _UNPACK:
        return None
    bits, block_bytes, unpack = _UNPACK[kind]
    rows = raw.shape[0]
    codes, scales, minimums = unpack(raw.reshape(-1, block_bytes))
    return GroupQuantized(
        bits,
        torch.from_numpy(codes.reshape(rows, -1)),
        torch.from_numpy(scales.reshape(rows, -1)),
        None if minimums is None else torch.from_numpy(minimums.reshape(rows, -1)),
    )


def _halves(blocks: Bytes, start: int) -> npt.NDArray[np.float16]:
    """The fp16 number at byte `start` of each block."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """(..., n) bytes to (..., 2 n) codes: the low halves, then the high ones."""
    codes = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0, :])
    np.right_shift(packed, 4, out=codes[..., 1, :])
    return codes.reshape(*packed.shape[:-1], -1)


def _q4_0(blocks: Bytes) -> _Arrays:
    return _nibbles(blocks[:, 2:]), _halves(blocks, 0), None


def _q4_1(blocks: Bytes) -> _Arrays:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> _Arrays:
    """scale * (code - 16), as an 8-bit code whose zero is at 128."""
    codes = _nibbles(blocks[:, 6:])
    codes |= np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << 4
    codes += 128 - 16
    return codes, _halves(blocks, 0), None


def _q8_0(blocks: Bytes) -> _Arrays:
    return blocks[:, 2:] ^ np.uint8(128), _halves(blocks, 0), None


def _q4_k(blocks: Bytes) -> _Arrays:
    """256 columns: two fp16 factors, eight 6-bit scales and minimums, and codes in four runs of 64."""
    factor, minimum_factor = (_halves(blocks, start).astype(np.float32) for start in (0, 2))
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    low, high = packed[:, 0:2], packed[:, 2]  # low: scales 0-3 and minimums 0-3, and the top bits of 4-7 above them
    scales = np.concatenate((low[:, 0] & 63, (high & 15) | (low[:, 0] >> 6 << 4)), axis=1)
    minimums = np.concatenate((low[:, 1] & 63, (high >> 4) | (low[:, 1] >> 6 << 4)), axis=1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, GROUP))
    return codes, (factor * scales).astype(np.float16), (-minimum_factor * minimums).astype(np.float16)


_UNPACK: dict[Any, tuple[int, int, Callable[[Bytes], _Arrays]]] = {  # type: bits, bytes of a block, how
    GGMLQuantizationType.Q4_0: (4, 18, _q4_0),
    GGMLQuantizationType.Q4_1: (4, 20, _q4_1),
    GGMLQuantizationType.Q5_0: (8, 22, _q5_0),
    GGMLQuantizationType.Q8_0: (8, 34, _q8_0),
    GGMLQuantizationType.Q4_K: (4, 144, _q4_k),
}
