"""Weights that others have quantized, repacked once, when they are loaded. GGUF's blocks become GroupQuantized when
their file is read; `matrix.pack` takes these."""

from __future__ import annotations

import torch

from meshlm.kernels.gpu.checks import require
from meshlm.kernels.gpu.matrix import GROUPS, QuantizedMatrix, pack_codes, padded_cols

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight outputs beside one another, those that a word holds, lowest first
_GPTQ_ZERO = 1  # is added to GPTQ's zero points, of which the file holds one less


def from_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, device: torch.device | None = None
) -> QuantizedMatrix:
    """A weight as AutoAWQ's GEMM version writes it (arXiv:2306.00978): `(code - zero) * scale`.

    qweight: (cols, rows / 8) int32, eight 4-bit codes of outputs in a word; qzeros: (groups, rows / 8) int32, packed
    alike; scales: (groups, rows) float16. Raises ArgumentError: another type or shape, groups that there are not.
    """
    cols, rows = qweight.shape[0], qweight.shape[1] * 8
    _check("qweight", qweight, (cols, rows // 8), torch.int32)
    groups = scales.shape[0]
    _check("qzeros", qzeros, (groups, rows // 8), torch.int32)
    _check("scales", scales, (groups, rows), scales.dtype)
    codes, zeros = (_awq_outputs(_unpacked(words, 4)) for words in (qweight, qzeros))
    return _packed(codes.t(), zeros.t(), scales.t(), 4, device)


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    bits: int = 4,
    device: torch.device | None = None,
) -> QuantizedMatrix:
    """A weight as GPTQ's first format has it (arXiv:2210.17323): `(code - zero - 1) * scale`.

    qweight: (cols * bits / 32, rows) int32, codes of inputs in a word; qzeros: (groups, rows * bits / 32) int32, of
    outputs; scales: (groups, rows) float16; g_idx: (cols,), each column's group, None where they follow one another;
    bits: 4, or 8 with all zero points in the middle.
    Raises ArgumentError: another type or shape, groups that there are not; a `g_idx` that scatters groups over the
    columns (act-order): a product would have to reorder its input.
    """
    require(bits in (4, 8), "bits", f"is {bits}, must be 4 or 8")
    each = 32 // bits
    cols, rows, groups = qweight.shape[0] * each, qweight.shape[1], scales.shape[0]
    _check("qweight", qweight, (cols // each, rows), torch.int32)
    _check("qzeros", qzeros, (groups, rows // each), torch.int32)
    _check("scales", scales, (groups, rows), scales.dtype)
    if g_idx is not None:
        _check("g_idx", g_idx, (cols,), g_idx.dtype)
        follow = torch.arange(cols, device=g_idx.device) // (-(-cols // groups))
        require(bool((g_idx == follow).all()), "g_idx", "scatters groups over the columns (act-order)")
    codes = _unpacked(qweight.t(), bits)  # (rows, cols)
    zeros = _unpacked(qzeros, bits) + _GPTQ_ZERO
    return _packed(codes, zeros.t(), scales.t(), bits, device)


def _check(argument: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = (tuple(tensor.shape), tensor.dtype)
    require(found == (shape, dtype), argument, f"is {found[1]} {found[0]}, must be {dtype} {shape}")


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, n) int32 to (rows, 32 / bits * n) uint8, the lowest bits of a word first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    values = words.unsqueeze(-1) >> shifts & (1 << bits) - 1
    return values.to(torch.uint8).flatten(1)


def _awq_outputs(values: torch.Tensor) -> torch.Tensor:
    """Values in the order of a word's bits, (n, rows), in the order of outputs."""
    places = torch.tensor(_AWQ_COLUMNS, device=values.device).argsort()
    return values.view(len(values), -1, 8)[:, :, places].flatten(1)


def _packed(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int, device: torch.device | None
) -> QuantizedMatrix:
    """codes: (rows, cols); zeros, scales: (rows, groups). Zero points in the middle make a weight without minimums."""
    cols, groups = codes.shape[1], scales.shape[1]
    require(cols % groups == 0, "scales", f"are of {groups} groups, which {cols} columns have not")
    group = cols // groups
    if bits == 8 and groups == 1:
        group = padded_cols(cols)
    elif group not in GROUPS:  # one scale for more columns than a group has: repeated for each of its groups
        most = max(GROUPS)
        require(groups == 1 or group % most == 0, "scales", f"are of groups of {group}, must be of one of {GROUPS}")
        repeats = -(-group // most)
        zeros, scales, group = zeros.repeat_interleave(repeats, 1), scales.repeat_interleave(repeats, 1), most
    middle = bool((zeros == 1 << bits - 1).all())
    require(middle or bits == 4, "qzeros", "of 8 bits are not all in the middle")
    minimums = None if middle else -(scales.float() * zeros.float())
    return pack_codes(codes.contiguous(), scales, minimums, bits, group, device)
