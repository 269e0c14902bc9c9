"""The product of rows with a quantized weight, on a GPU."""

from __future__ import annotations

import torch

from meshlm.kernels.gpu.checks import require, require_capability, require_runs_on, require_tensor
from meshlm.kernels.gpu.matmul_launch import FP8_CAPABILITY, Activation, launch, require_matrix
from meshlm.kernels.gpu.matrix import QuantizedMatrix
from meshlm.kernels.gpu.quantize_rows import quantize_rows

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def quant_matmul(
    x: torch.Tensor,
    matrix: QuantizedMatrix,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`activation(x @ weight.T + bias) + residual`: (rows, outputs), of x's type, sums in float32.

    x: (rows, cols) bfloat16, float16 or float32 (float16 and float32 are for tests: bfloat16 has the fast path).
    matrix: its rows are the outputs; with fp8, x is quantized to fp8 too, each row with its own scale, which needs
    compute capability 8.9. bias: (matrix.rows,), of a float type. activation: of the first half of the matrix's rows
    (the gate), by which the other half (up) is multiplied: outputs is then half of matrix.rows. residual: (rows,
    outputs) of x's type. out: the same, may be the residual itself.
    Raises ArgumentError before the launch: another shape, type, device or stride; fp8 on an older GPU.
    """
    require_runs_on(x.device, "x")
    require_matrix(matrix, "matrix", x.device)
    require_tensor("x", x, shape=(None, matrix.cols), dtypes=_FLOATS, device=x.device)
    require(activation in (None, "silu", "gelu_tanh"), "activation", f"is {activation!r}")
    require(activation is None or matrix.rows % 2 == 0, "activation", f"halves {matrix.rows} rows")
    outputs = matrix.rows if activation is None else matrix.rows // 2
    shape = (x.shape[0], outputs)
    if bias is not None:
        require_tensor("bias", bias, shape=(matrix.rows,), dtypes=_FLOATS, device=x.device)
    if residual is not None:
        require_tensor("residual", residual, shape=shape, dtypes=(x.dtype,), device=x.device)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    else:
        require_tensor("out", out, shape=shape, dtypes=(x.dtype,), device=x.device)
    if matrix.format == "fp8":
        require_capability(x.device, FP8_CAPABILITY, "matrix")
    if x.shape[0] == 0:
        return out
    scales = None
    if matrix.format == "fp8":
        x, scales = quantize_rows(x)
    launch(x, matrix, matrix.rows, out, x_scales=scales, bias=bias, residual=residual, activation=activation)
    return out
