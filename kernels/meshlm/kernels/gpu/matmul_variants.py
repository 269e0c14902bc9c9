"""What serving compiles of the products with weights. The shapes of Llama-3-8B, of -70B on 8 GPUs and of Mixtral 8x7B
differ in no constant of a kernel: all have widths that tiles divide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from meshlm.kernels.gpu.capabilities import shared_limit
from meshlm.kernels.gpu.matmul_launch import Weight, default_config, gpu_with, is_skinny, sums_apart
from meshlm.kernels.gpu.quant_matmul_skinny import skinny_kernel
from meshlm.kernels.gpu.quant_matmul_tall import tall_kernel
from meshlm.kernels.gpu.variants import ARCHITECTURES, FP8_ARCHITECTURES, Variant, by_config

_PROCESSORS = 132
_CODES = {"int4": "*u8:16", "int8": "*i8:16", "fp8": "*fp8e4nv:16", "dense": "*bf16:16"}
_NUMBERS = ("N", "cols", "x_stride", "codes_stride", "scales_stride", "out_stride", "residual_stride")
_OPTIONAL = ("bias", "residual", "partials", "counters", "block_experts", "order")
_PRODUCTS = (  # format, group, minimums, rows of x, what else
    ("int4", 32, False, 16, ""),
    ("int4", 32, False, 16, "split"),
    ("int4", 32, False, 16, "split residual"),
    ("int4", 32, False, 16, "split gated"),
    ("int4", 32, True, 16, "split"),
    ("int4", 64, False, 16, "split"),
    ("int4", 128, False, 16, "split"),
    ("int4", 128, True, 16, "split"),
    ("int8", 32, False, 16, "split"),
    ("int8", 0, False, 16, "split"),
    ("fp8", 0, False, 16, "split"),
    ("int4", 32, False, 32, "split"),
    ("int4", 32, False, 64, ""),
    ("int4", 32, False, 64, "split"),
    ("int4", 32, False, 256, ""),
    ("int4", 32, False, 2048, ""),
    ("int4", 32, False, 2048, "gated"),
    ("int4", 32, True, 2048, ""),
    ("int4", 128, False, 2048, ""),
    ("int4", 128, True, 2048, ""),
    ("int8", 32, False, 2048, ""),
    ("int8", 0, False, 2048, ""),
    ("fp8", 0, False, 2048, ""),
    ("dense", 0, False, 16, "split gated routed"),
    ("dense", 0, False, 16, "split routed"),
    ("dense", 0, False, 128, "gated routed"),
    ("dense", 0, False, 128, "routed"),
    ("int4", 32, False, 16, "split gated routed"),
    ("int4", 32, False, 16, "split routed"),
    ("int4", 32, False, 128, "gated routed"),
    ("int8", 32, False, 128, "routed"),
)


def variants() -> Iterator[Variant]:
    for product in _PRODUCTS:
        yield from _variants(*product)


def _variants(format_: str, group: int, minimums: bool, height: int, extras: str) -> Iterator[Variant]:
    """One for each configuration that some architecture is served in."""
    nothing = torch.empty(0)
    weight = Weight(format_, nothing, nothing, nothing if minimums else None, group, 4096)

    def config_of(architecture: int) -> dict[str, int]:
        gpu = gpu_with(_PROCESSORS, architecture // 10, shared_limit(architecture))
        return {**default_config(weight, height, gpu), "APART": sums_apart(weight, gpu.major)}

    served = FP8_ARCHITECTURES if format_ == "fp8" else ARCHITECTURES
    for suffix, config, architectures in by_config(served, config_of):
        yield _variant(weight, height, extras, suffix, config, architectures)


def _variant(
    weight: Weight, height: int, extras: str, suffix: str, config: dict[str, int], architectures: tuple[int, ...]
) -> Variant:
    format_, group, minimums = weight.format, weight.group, weight.minimums is not None
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
    constants |= {name: config[name] for name in ("BM", "BN", "STEP", "STAGES", "APART")}
    constants |= {"FORMAT": format_, "GROUP": group, "EVEN": True, "ACTIVATION": "silu" if "gated" in words else None}
    numbers = f"{format_}{f' in {group}' if group else ''}{' with minimums' if minimums else ''}"
    return Variant(
        name=f"quant_matmul {numbers}, {height} rows{f', {extras}' if extras else ''}{suffix}",
        kernel=skinny_kernel if is_skinny(weight, height) else tall_kernel,
        types=types,
        constants=constants,
        options={"num_warps": config["num_warps"]},
        architectures=architectures,
    )
