"""Weights of torch in the layout that the native products read (`src/matrix.h`)."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p

import torch

from meshlm.kernels.native import structures
from meshlm.kernels.native.library import Library, open_library
from meshlm.kernels.native.memory import Arena
from meshlm.kernels.native.packed import Format, PackedMatrix
from meshlm.kernels.quantize import GROUP, GroupQuantized

_MATRIX = ctypes.POINTER(structures.Matrix)


def pack(
    weight: torch.Tensor | GroupQuantized, *, library: Library | None = None, arena: Arena | None = None
) -> PackedMatrix:
    """A packed copy of a weight (rows, cols): a float32 or bfloat16 tensor, or a quantized weight; on the CPU.

    arena: where its memory comes from; matrices of a model should share one. Raises ValueError where the weight is not
    what it should be.
    """
    library = library or open_library()
    arena = arena or Arena(0)
    if isinstance(weight, GroupQuantized):
        return _pack_quantized(weight, library, arena)
    form = {torch.float32: Format.F32, torch.bfloat16: Format.BF16}.get(weight.dtype)
    if form is None:
        raise ValueError(f"weight must be float32 or bfloat16, not {weight.dtype}")
    rows, cols = _shape("weight", weight)
    packed = PackedMatrix(form, rows, cols, arena)
    dense = weight.detach().contiguous()
    function = library.function("native_pack_dense", None, _MATRIX, c_void_p)
    function(packed.handle, dense.data_ptr())
    return packed


def _pack_quantized(weight: GroupQuantized, library: Library, arena: Arena) -> PackedMatrix:
    rows, cols = _shape("weight.codes", weight.codes)
    form = _format_of(weight)
    if cols % GROUP:
        raise ValueError(f"weight.codes must have a multiple of {GROUP} columns, not {cols}")
    _check("weight.codes", weight.codes, torch.uint8, (rows, cols))
    _check("weight.scales", weight.scales, torch.float16, (rows, cols // GROUP))
    if weight.minimums is not None:
        _check("weight.minimums", weight.minimums, torch.float16, (rows, cols // GROUP))
    if form is not Format.Q8 and int(weight.codes.max()) > 15:
        raise ValueError(f"weight.codes must be below 16 in a 4-bit weight, and one is {int(weight.codes.max())}")
    packed = PackedMatrix(form, rows, cols, arena)
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    minimums = None if weight.minimums is None else weight.minimums.contiguous()
    function = library.function("native_pack", None, _MATRIX, c_void_p, c_void_p, c_void_p)
    function(packed.handle, codes.data_ptr(), scales.data_ptr(), None if minimums is None else minimums.data_ptr())
    return packed


def _format_of(weight: GroupQuantized) -> Format:
    if weight.bits == 4:
        return Format.Q4 if weight.minimums is None else Format.Q4M
    if weight.bits != 8:
        raise ValueError(f"weight.bits must be 4 or 8, not {weight.bits}")
    if weight.minimums is not None:
        raise ValueError("weight.minimums must be None in an 8-bit weight, which is symmetric")
    return Format.Q8


def _shape(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(f"{name} must be (rows, cols) with at least one of each, not {tuple(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")
    rows, cols = tensor.shape
    return rows, cols


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, not {tuple(tensor.shape)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")
