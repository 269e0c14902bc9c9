"""Weights quantized on the device, as a model is loaded, and back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from kernel_cases.case import LLAMA_8B, Case, Plan, Work
from meshlm.kernels.gpu.matrix import WeightFormat, pack, unpack
from meshlm.kernels.gpu.quantize import dequantize, quantize

FORMATS: dict[str, tuple[WeightFormat, dict[str, Any]]] = {
    "int4 groups of 32": ("int4", {"group": 32}),
    "int4 groups of 128 with minimum": ("int4", {"group": 128, "minimum": True}),
    "int8 rows": ("int8", {}),
    "fp8 rows": ("fp8", {}),
}


def quantize_work(plan: Plan, name: str, rows: int, cols: int) -> Work:
    """Beside torch's operations, with a plainer search of scales."""
    weight_format, options = FORMATS[name]
    weight = plan.randn(rows, cols, dtype=plan.dtype)
    moved = weight.nbytes + quantize(weight, weight_format, **options).nbytes
    peers = {"in torch's operations": lambda _: pack(weight, weight_format, **options)}
    return Work(lambda _: quantize(weight, weight_format, **options), 1, moved, 0, peers, None, captured=False)


def dequantize_work(plan: Plan, name: str, rows: int, cols: int) -> Work:
    weight_format, options = FORMATS[name]
    matrix = quantize(plan.randn(rows, cols, dtype=plan.dtype), weight_format, **options)
    moved = matrix.nbytes + 2 * rows * cols
    peers = {"in torch's operations": lambda _: unpack(matrix).to(plan.dtype)}
    return Work(lambda _: dequantize(matrix, dtype=plan.dtype), 1, moved, 0, peers)


def cases(plan: Plan) -> Iterator[Case]:
    size = (2 * LLAMA_8B.ffn, LLAMA_8B.hidden)
    for name in list(FORMATS)[:2] if plan.quick else FORMATS:
        yield Case(f"quantize {name}, {size[0]} x {size[1]}", partial(quantize_work, plan, name, *size))
        yield Case(f"dequantize {name}, {size[0]} x {size[1]}", partial(dequantize_work, plan, name, *size))
