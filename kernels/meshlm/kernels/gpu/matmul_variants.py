"""What serving compiles of the products with weights: for Llama-3-8B, -70B on 8 GPUs, and Mixtral 8x7B, whose shapes
differ in no constant of a kernel but these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from meshlm.kernels.gpu.matmul_launch import MOST_SKINNY, Gpu, Weight, default_config
from meshlm.kernels.gpu.quant_matmul_skinny import skinny_kernel
from meshlm.kernels.gpu.quant_matmul_tall import tall_kernel
from meshlm.kernels.gpu.variants import ARCHITECTURES, Variant

SHAPES = {  # (rows, cols) of weights
    "Llama-3-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "Llama-3-70B / 8": ((1280, 8192), (8192, 1024), (7168, 8192), (8192, 3584), (16032, 8192)),
    "Mixtral 8x7B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32000, 4096)),
}
_H100 = Gpu(processors=132, major=9, shared=160 << 10)
_WIDE, _NARROW = 28672, 4096
_CODES = {"int4": "*u8:16", "int8": "*i8:16", "fp8": "*fp8e4nv:16", "dense": "*bf16:16"}
_NUMBERS = ("N", "cols", "x_stride", "codes_stride", "scales_stride", "out_stride", "residual_stride")
_OPTIONAL = ("bias", "residual", "partials", "counters", "block_experts", "order")
_PRODUCTS = (  # format, group, minimums, rows of x, rows of the weight, what else
    ("int4", 32, False, 16, _WIDE, ""),
    ("int4", 32, False, 16, _WIDE, "split"),
    ("int4", 32, False, 16, _NARROW, "split"),
    ("int4", 32, False, 16, _NARROW, "split residual"),
    ("int4", 32, False, 16, _WIDE, "split gated"),
    ("int4", 32, True, 16, _WIDE, "split"),
    ("int4", 64, False, 16, _WIDE, "split"),
    ("int4", 128, False, 16, _WIDE, "split"),
    ("int4", 128, False, 16, _NARROW, "split"),
    ("int4", 128, True, 16, _WIDE, "split"),
    ("int8", 32, False, 16, _WIDE, "split"),
    ("int8", 0, False, 16, _WIDE, "split"),
    ("fp8", 0, False, 16, _WIDE, "split"),
    ("int4", 32, False, 32, _WIDE, "split"),
    ("int4", 128, True, 32, _WIDE, "split"),
    ("int4", 32, False, 64, _WIDE, ""),
    ("int4", 32, False, 64, _NARROW, "split"),
    ("int4", 32, False, 256, _WIDE, ""),
    ("int4", 32, False, 2048, _WIDE, ""),
    ("int4", 32, False, 2048, _WIDE, "gated"),
    ("int4", 32, True, 2048, _WIDE, ""),
    ("int4", 128, False, 2048, _WIDE, ""),
    ("int4", 128, True, 2048, _WIDE, ""),
    ("int8", 32, False, 2048, _WIDE, ""),
    ("int8", 0, False, 2048, _WIDE, ""),
    ("fp8", 0, False, 2048, _WIDE, ""),
    ("dense", 0, False, 16, _WIDE, "split gated routed"),
    ("dense", 0, False, 16, _NARROW, "split routed"),
    ("dense", 0, False, 128, _WIDE, "gated routed"),
    ("dense", 0, False, 128, _NARROW, "routed"),
    ("int4", 32, False, 16, _WIDE, "split gated routed"),
    ("int4", 32, False, 16, _NARROW, "split routed"),
    ("int4", 32, False, 128, _WIDE, "gated routed"),
    ("int8", 32, False, 128, _NARROW, "routed"),
)


def variants() -> Iterator[Variant]:
    for product in _PRODUCTS:
        yield _variant(*product)


def _variant(format_: str, group: int, minimums: bool, height: int, rows: int, extras: str) -> Variant:
    nothing = torch.empty(0)
    weight = Weight(format_, nothing, nothing, nothing if minimums else None, group, 4096)
    config = default_config(weight, rows, height, _H100)
    words = extras.split()
    given = {"partials", "counters"} if "split" in words else set()
    given |= {"block_experts", "order"} if "routed" in words else set()
    given |= {"residual"} if "residual" in words else set()
    types = {name: "*fp32:16" if name == "partials" else "*i32:16" for name in ("partials", "counters")}
    types |= {"block_experts": "*i32:16", "order": "*i32:16", "residual": "*bf16:16", "out": "*bf16:16"}
    types |= {"x": "*fp8e4nv:16" if format_ == "fp8" else "*bf16:16", "codes": _CODES[format_]}
    types |= {"scales": "*fp32:16" if format_ == "fp8" else "*fp16:16", "minimums": "*fp16:16", "x_scales": "*fp32:16"}
    types |= dict.fromkeys(_NUMBERS, "i32:16")
    types |= dict.fromkeys(("rows", "active", "splits", "steps", "blocks"), "i32")
    constants: dict[str, Any] = {name: None for name in _OPTIONAL if name not in given}
    constants |= {} if minimums else {"minimums": None}
    constants |= {} if format_ == "fp8" else {"x_scales": None}
    constants |= {"scales": None} if format_ == "dense" else {}
    constants |= {name: config[name] for name in ("BM", "BN", "STEP", "STAGES")}
    constants |= {"FORMAT": format_, "GROUP": group, "EVEN": True, "ACTIVATION": "silu" if "gated" in words else None}
    numbers = f"{format_}{f' in {group}' if group else ''}{' with minimums' if minimums else ''}"
    return Variant(
        name=f"quant_matmul {numbers}, {height} x {rows}{f', {extras}' if extras else ''}",
        kernel=skinny_kernel if config["BM"] <= MOST_SKINNY else tall_kernel,
        types=types,
        constants=constants,
        options={"num_warps": config["num_warps"]},
        architectures=(90, 100) if format_ == "fp8" else ARCHITECTURES,
    )
