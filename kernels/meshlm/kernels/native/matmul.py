"""Products of activations with packed weights, one call an operation: what `step.cpp` does inside a step.

Activations meet quantized weights as int8, with one scale for each group of 32 columns of a row (largest magnitude /
127, rounded to nearest even); sums within a group are exact integers, and groups are added in order. A row's result is
the same bits whatever other rows are beside it.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int8, c_int32, c_void_p

import torch

from meshlm.kernels.native import structures
from meshlm.kernels.native.library import Library, Pool, open_library
from meshlm.kernels.native.packed import Format, PackedMatrix
from meshlm.kernels.quantize import GROUP, GroupQuantized, dequantize

_MATRIX = ctypes.POINTER(structures.Matrix)
_MOST = 127  # activations are rounded to [-127, 127]


class _Activations(ctypes.Structure):
    """`Activations` of `src/matrix.h`."""

    _fields_ = (
        ("cols", c_int),
        ("values", ctypes.POINTER(c_float)),
        ("codes", ctypes.POINTER(c_int8)),
        ("scales", ctypes.POINTER(c_float)),
        ("sums", ctypes.POINTER(c_float)),
    )


def quantize_activations(
    x: torch.Tensor, *, library: Library | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x: (tokens, cols) float32, cols a multiple of GROUP. Returns codes (tokens, cols) int8, scales and sums (tokens,
    cols / GROUP) float32: `x` is about scale * code, and sum = scale * (the sum of a group's codes).

    Raises ValueError for another shape or dtype.
    """
    _check_activations(x)
    tokens, cols = x.shape
    if cols % GROUP:
        raise ValueError(f"x must have a multiple of {GROUP} columns, not {cols}")
    x = x.contiguous()
    codes = torch.empty(tokens, cols, dtype=torch.int8)
    scales, sums = torch.empty(tokens, cols // GROUP), torch.empty(tokens, cols // GROUP)
    function = (library or open_library()).function(
        "native_quantize", None, c_void_p, c_int, c_int, c_void_p, c_void_p, c_void_p
    )
    function(x.data_ptr(), tokens, cols, codes.data_ptr(), scales.data_ptr(), sums.data_ptr())
    return codes, scales, sums


def multiply(x: torch.Tensor, matrix: PackedMatrix, pool: Pool, index: torch.Tensor | None = None) -> torch.Tensor:
    """x: (tokens, cols) float32. Returns (tokens, rows) float32, or (count, rows) for the tokens that `index` names.

    index: (count,) int32, each in [0, tokens); a mixture of experts multiplies some tokens only. Raises ValueError.
    """
    _check_activations(x)
    if x.shape[1] != matrix.cols:
        raise ValueError(f"x must have {matrix.cols} columns, as the matrix has, not {x.shape[1]}")
    if index is not None:
        _check_index(index, x.shape[0])
    x = x.contiguous()
    inputs = _Activations(matrix.cols, ctypes.cast(x.data_ptr(), ctypes.POINTER(c_float)))
    if matrix.format not in (Format.F32, Format.BF16):
        codes, scales, sums = quantize_activations(x, library=pool.library)
        inputs.codes = ctypes.cast(codes.data_ptr(), ctypes.POINTER(c_int8))
        inputs.scales = ctypes.cast(scales.data_ptr(), ctypes.POINTER(c_float))
        inputs.sums = ctypes.cast(sums.data_ptr(), ctypes.POINTER(c_float))
    count = x.shape[0] if index is None else len(index)
    out = torch.empty(count, matrix.rows)
    function = pool.library.function(
        "native_multiply", None, c_void_p, _MATRIX, ctypes.POINTER(_Activations), c_void_p, c_int, c_void_p
    )
    kept = None if index is None else index.contiguous()
    function(pool.handle, matrix.handle, inputs, None if kept is None else kept.data_ptr(), count, out.data_ptr())
    return out


def read_row(matrix: PackedMatrix, row: int, *, library: Library | None = None) -> torch.Tensor:
    """Row `row` as (cols,) float32: an embedding. Raises ValueError where there is no such row."""
    if not 0 <= row < matrix.rows:
        raise ValueError(f"row must be in [0, {matrix.rows}), and is {row}")
    out = torch.empty(matrix.cols)
    function = (library or open_library()).function("native_read_row", None, _MATRIX, c_int32, c_void_p)
    function(matrix.handle, row, out.data_ptr())
    return out


def reference_quantize_activations(x: torch.Tensor) -> torch.Tensor:
    """The activations that a product with a quantized weight sees: rounded and multiplied back, float64."""
    grouped = x.view(x.shape[0], x.shape[1] // GROUP, GROUP)
    scales = grouped.abs().amax(-1, keepdim=True) / _MOST
    codes = torch.where(scales > 0, torch.round(grouped / scales), 0.0)
    return (codes.double() * scales.double()).view(x.shape)


def reference_multiply(x: torch.Tensor, weight: torch.Tensor | GroupQuantized) -> torch.Tensor:
    """The definition in float64: (tokens, cols) and (rows, cols) to (tokens, rows)."""
    if isinstance(weight, GroupQuantized):
        return reference_quantize_activations(x) @ dequantize(weight).double().T
    return x.double() @ weight.double().T


def _check_activations(x: torch.Tensor) -> None:
    if x.dim() != 2 or x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"x must be (tokens, cols) float32 on the CPU, not {tuple(x.shape)} {x.dtype} on {x.device}")


def _check_index(index: torch.Tensor, tokens: int) -> None:
    if index.dim() != 1 or index.dtype != torch.int32 or index.device.type != "cpu":
        raise ValueError(f"index must be (count,) int32 on the CPU, not {tuple(index.shape)} {index.dtype}")
    if len(index) and (int(index.min()) < 0 or int(index.max()) >= tokens):
        raise ValueError(f"index must name tokens in [0, {tokens})")
