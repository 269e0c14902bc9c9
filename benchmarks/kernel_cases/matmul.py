"""Products with quantized weights, of the projections of a layer, at decode's and prefill's numbers of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from kernel_cases.case import MODELS, Call, Case, Goal, Model, Plan, Work
from meshlm.kernels.gpu.matrix import QuantizedMatrix, WeightFormat, pack, unpack
from meshlm.kernels.gpu.quant_matmul import quant_matmul
from meshlm.kernels.gpu.quantize_rows import quantize_rows

GROUP = 128
LINEAR = "bf16 linear"
SKINNY = (1, 4, 16)


def projections(model: Model) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's weights."""
    return {
        "qkv": (model.qkv_rows, model.hidden),
        "output": (model.hidden, model.heads * model.head_dim),
        "gate_up": (2 * model.ffn, model.hidden),
        "down": (model.hidden, model.ffn),
    }


def _packed(plan: Plan, weight_format: WeightFormat, rows: int, cols: int) -> QuantizedMatrix:
    weight = plan.randn(rows, cols) * 0.02
    return (
        pack(weight, weight_format, group=GROUP, minimum=True)
        if weight_format == "int4"
        else pack(weight, weight_format)
    )


def product_work(
    plan: Plan, weight_format: WeightFormat, rows: int, size: tuple[int, int], fused: bool = False
) -> Work:
    """fused: SwiGLU in the product's epilogue, beside torch's product and then torch's activation."""
    first = _packed(plan, weight_format, *size)
    matrices = [first, *(_packed(plan, weight_format, *size) for _ in range(plan.sets(first.nbytes) - 1))]
    dense = [unpack(matrix).to(plan.dtype) for matrix in matrices]
    inputs = [plan.randn(rows, size[1], dtype=plan.dtype) for _ in matrices]

    def linear(i: int) -> torch.Tensor:
        out = functional.linear(inputs[i], dense[i])
        if not fused:
            return out
        gate, up = out.chunk(2, 1)
        return functional.silu(gate) * up

    def ours(i: int) -> torch.Tensor:
        return quant_matmul(inputs[i], matrices[i], activation="silu" if fused else None)

    peers: dict[str, Call] = {LINEAR: linear}
    if not fused:
        peers |= _quantized_peers(plan, weight_format, matrices, inputs)
    outputs = size[0] // 2 if fused else size[0]
    moved = first.nbytes + inputs[0].nbytes + 2 * rows * outputs
    tolerance = 0.05 if weight_format == "fp8" else 0.02  # activations in fp8
    return Work(ours, len(matrices), moved, 2.0 * rows * size[0] * size[1], peers, tolerance)


def _quantized_peers(
    plan: Plan, weight_format: WeightFormat, matrices: list[QuantizedMatrix], inputs: list[torch.Tensor]
) -> dict[str, Call]:
    """What torch has for the format. Its 4-bit weights are other ones, of the same size: only time is compared."""
    rows, cols = matrices[0].rows, matrices[0].cols
    if weight_format == "fp8":
        ready = [quantize_rows(x) for x in inputs]

        def scaled(i: int) -> torch.Tensor:
            (codes, scales), matrix = ready[i], matrices[i]
            return torch._scaled_mm(
                codes, matrix.codes.t(), scales.unsqueeze(1), matrix.scales.unsqueeze(0), out_dtype=torch.bfloat16
            )

        return {"_scaled_mm (x in fp8 already)": scaled}
    if weight_format == "int8":
        scales8 = [matrix.scales[0].bfloat16() for matrix in matrices]
        return {"_weight_int8pack_mm": lambda i: torch._weight_int8pack_mm(inputs[i], matrices[i].codes, scales8[i])}
    packed: list[torch.Tensor] = []
    scales4 = torch.rand(cols // GROUP, rows, 2, dtype=torch.bfloat16, device=plan.device)

    def int4(i: int) -> torch.Tensor:
        while len(packed) <= i:
            codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, device=plan.device)
            packed.append(torch._convert_weight_to_int4pack(codes, 8))
        return torch._weight_int4pack_mm(inputs[i], packed[i], GROUP, scales4)

    return {"_weight_int4pack_mm": int4}


def cases(plan: Plan) -> Iterator[Case]:
    every_row = (1, 16, 256) if plan.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 2048)
    formats: tuple[WeightFormat, ...] = ("int4", "int8", "fp8")
    for model in MODELS:
        for name, size in projections(model).items():
            if plan.quick and name not in ("gate_up", "down"):
                continue
            for weight_format in formats:
                for rows in every_row:
                    skinny = weight_format == "int4" and rows <= 16
                    goal = Goal(of_limit=0.75, times=3.0, peer=LINEAR) if skinny else Goal()
                    if weight_format == "int8" and plan.quick:
                        continue
                    work = partial(product_work, plan, weight_format, rows, size)
                    yield Case(f"{weight_format} matmul {model.name} {name}, {rows} rows", work, goal)
        for rows in (1, 256):
            work = partial(product_work, plan, "int4", rows, projections(model)["gate_up"], True)
            yield Case(f"int4 matmul {model.name} gate_up with SwiGLU, {rows} rows", work)
