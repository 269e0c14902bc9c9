"""How a product of rows with a weight is launched: which kernel, in which configuration, over which grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton

from meshlm.kernels.gpu.capabilities import LATEST_MAJOR, multiplies_from_shared, shared_limit, sums_fp8_exactly
from meshlm.kernels.gpu.checks import require
from meshlm.kernels.gpu.configs import choose
from meshlm.kernels.gpu.matrix import Matrix, QuantizedMatrix
from meshlm.kernels.gpu.quant_matmul_skinny import skinny_kernel
from meshlm.kernels.gpu.quant_matmul_tall import tall_kernel

Activation = Literal["silu", "gelu_tanh"]

FP8_CAPABILITY = (8, 9)
BITS = {"int4": 4, "int8": 8, "fp8": 8, "dense": 16}
_FORMATS = tuple(BITS)  # whose places are in the keys of configurations
_TILES = 1 << 16  # that may be split
_MOST_SPLITS = 32
_SHARED = 160 << 10  # bytes: more brings no more
_RESERVED = 4 << 10  # bytes, for what passes between threads


@dataclass(frozen=True, slots=True)
class Routed:
    """Rows of x that go to experts, in blocks of one expert each, see `moe_align.align`.

    block: rows of a block; experts: (blocks,) int32, below 0 where a block has no rows; order: (blocks * block,) int32,
    of each place the pair that it computes, pairs where it is empty; pairs: rows of the output; active: pairs that
    share a row of x: pair p reads row p / active.
    """

    block: int
    experts: torch.Tensor
    order: torch.Tensor
    pairs: int
    active: int


@dataclass(frozen=True, slots=True)
class Weight:
    """What kernels ask of a matrix, dense or quantized."""

    format: str
    codes: torch.Tensor
    scales: torch.Tensor | None
    minimums: torch.Tensor | None
    group: int  # 0 where no group within a row has a scale of its own
    cols: int

    @staticmethod
    def of(matrix: Matrix) -> Weight:
        if isinstance(matrix, torch.Tensor):
            return Weight("dense", matrix, None, None, 0, matrix.shape[1])
        group = 0 if matrix.group >= matrix.padded and matrix.format != "int4" else matrix.group
        return Weight(matrix.format, matrix.codes, matrix.scales, matrix.minimums, group, matrix.cols)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What default configurations depend on. shared: bytes of shared memory that a block may have, 160 KB at most."""

    processors: int
    major: int  # of the compute capability, see `capabilities`
    shared: int


def launch(
    x: torch.Tensor,
    matrix: Matrix,
    rows: int,
    out: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | None = None,
    routed: Routed | None = None,
) -> None:
    """Arguments are as the public functions have checked them. rows: of the matrix, or of one expert's part of it.

    No sync with the device, and no memory but torch's: may be captured in a CUDA graph, once it has run before.
    """
    weight = Weight.of(matrix)
    height = out.shape[0] if routed is None else routed.block
    gpu = gpu_of(x.device)
    default = default_config(weight, height, gpu)
    config = choose("quant_matmul", key_of(weight, rows, height, activation), default, x.device)
    block = config["BM"] if routed is None else routed.block
    blocks = triton.cdiv(out.shape[0], block) if routed is None else len(routed.experts)
    tiles = triton.cdiv(rows, config["BN"])
    every = triton.cdiv(weight.cols, config["STEP"])
    pipeline = config["STAGES"] + 1
    splits, steps = split_of(every, tiles * blocks, pipeline, config["PROGRAMS"], config["SPLIT"], gpu)
    partials = counters = None
    if splits > 1:
        size = tiles * blocks * splits * block * config["BN"]
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        counters = counters_of(x.device)
    arguments: tuple[Any, ...] = (
        *(x, weight.codes, weight.scales, weight.minimums, x_scales, bias, residual, out, partials, counters),
        *((None, None) if routed is None else (routed.experts, routed.order)),
        *(out.shape[0] if routed is None else routed.pairs, rows, weight.cols, x.stride(0), weight.codes.stride(0)),
        *(0 if weight.scales is None or weight.scales.dim() == 1 else weight.scales.stride(0), out.stride(0)),
        *(0 if residual is None else residual.stride(0), 1 if routed is None else routed.active, splits, steps),
    )
    constants: dict[str, Any] = {name: config[name] for name in ("BN", "STEP", "STAGES")}
    constants |= {"BM": block, "EVEN": weight.cols % config["STEP"] == 0}
    constants |= {"FORMAT": weight.format, "GROUP": weight.group, "ACTIVATION": activation}
    constants["APART"] = sums_apart(weight, gpu.major)
    if is_skinny(weight, block):
        skinny_kernel[(tiles, splits, blocks)](*arguments, **constants, num_warps=config["num_warps"])
    else:
        tall_kernel[(tiles * blocks, splits)](*arguments, blocks, **constants, num_warps=config["num_warps"])


def key_of(weight: Weight, rows: int, height: int, activation: Activation | None) -> tuple[int, ...]:
    """What the best configuration depends on: format, group, minimum or not, shape of the weight, gated or not, and
    rows of x rounded up to a power of two."""
    rounded = min(triton.next_power_of_2(height), 4096)
    minimum, gated = int(weight.minimums is not None), int(activation is not None)
    return (_FORMATS.index(weight.format), weight.group, minimum, rows, weight.cols, gated, rounded)


def sums_apart(weight: Weight, major: int) -> bool:
    """Whether the product of each step is summed by itself, see `dot.dot_apart`."""
    return weight.format == "fp8" and not sums_fp8_exactly(major)


def is_skinny(weight: Weight, height: int) -> bool:
    """Whether the kernel for few rows does it: with 32 rows the sums that minimums need would spill."""
    return height <= (32 if weight.minimums is None else 16)


def default_config(weight: Weight, height: int, gpu: Gpu) -> Mapping[str, int]:
    """For `height` rows of x, or, where they are routed, of a block.

    STEP: columns of an iteration, in the kernel for few rows 128 where groups have scales. PROGRAMS: so many at
    once keep a processor busy. SPLIT: what a program of a split costs beside its steps, in steps.
    """
    if is_skinny(weight, height):
        step = 64 if weight.format == "dense" else 128
        block, wide = 16 if height <= 16 else 32, height <= 16 and (weight.format != "int8" or not weight.group)
        shape = {"BM": block, "BN": 128 if wide else 64, "STEP": step, "STAGES": 3}
        return {**shape, "PROGRAMS": 3, "SPLIT": 1, "num_warps": 4}
    step = 128 if weight.format == "fp8" else 64
    block = 64 if height <= 64 else 128
    if height > 256 and weight.group and multiplies_from_shared(gpu.major):
        block = 256  # what a weight costs to become a float is paid once for more rows
    stage = step * (128 * BITS[weight.format] // 8 + block * (1 if weight.format == "fp8" else 2))
    most = 2 if gpu.major == 12 and weight.format == "int8" and weight.group else 4  # a third one spills there
    stages = max(2, min(most, gpu.shared // stage))
    return {"BM": block, "BN": 128, "STEP": step, "STAGES": stages, "PROGRAMS": 1, "SPLIT": 8, "num_warps": 8}


@cache
def split_of(steps: int, tiles: int, pipeline: int, programs: int, cost: int, gpu: Gpu) -> tuple[int, int]:
    """Into how many parts columns are split, and the steps of each: so that the processor with most to do has least.

    pipeline: steps that fill a program's pipeline, the least of a part; programs, cost: PROGRAMS and SPLIT of a
    configuration.
    """
    most = min(steps // pipeline, _MOST_SPLITS) if tiles <= _TILES else 1

    def load(splits: int) -> int:
        resident = max(-(-tiles * splits // gpu.processors), programs)
        return resident * (-(-steps // splits) + (cost if splits > 1 else 0))

    each = -(-steps // min(range(1, max(most, 1) + 1), key=load))
    return -(-steps // each), each


def gpu_with(processors: int, major: int, shared: int) -> Gpu:
    """shared: bytes that a block of the device may have."""
    return Gpu(processors, major, min(_SHARED, shared - _RESERVED))


_INTERPRETER = gpu_with(4, LATEST_MAJOR, shared_limit(90))


@cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return _INTERPRETER
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    found = torch.cuda.get_device_properties(device)
    return gpu_with(found.multi_processor_count, found.major, shared)


@cache
def counters_of(device: torch.device) -> torch.Tensor:
    """Of the splits of each tile that are done. All products of a device share them, so they must run on one stream."""
    return torch.zeros(_TILES, dtype=torch.int32, device=device)


def require_matrix(matrix: Matrix, argument: str, device: torch.device) -> None:
    """Raises ArgumentError unless kernels can read the matrix, and it is on the device."""
    parts = (matrix,) if isinstance(matrix, torch.Tensor) else (matrix.codes, matrix.scales, matrix.minimums)
    for part in parts:
        if part is not None:
            require(part.device == device, argument, f"is on {part.device}, must be on {device}")
            require(part.stride(-1) == 1, argument, "has a stride other than 1 in its last dimension")
    if isinstance(matrix, torch.Tensor):
        require(matrix.dim() == 2, argument, f"is of shape {tuple(matrix.shape)}, must be (rows, cols)")
    else:
        _require_layout(matrix, argument)


def _require_layout(matrix: QuantizedMatrix, argument: str) -> None:
    require(matrix.cols <= matrix.padded < matrix.cols + 64, argument, "is not padded as `pack` does it")
    groups = (matrix.rows,) if matrix.format == "fp8" else (-(-matrix.padded // matrix.group), matrix.rows)
    for part in (matrix.scales, matrix.minimums):
        fits = part is None or (tuple(part.shape) == groups and part.stride() == matrix.scales.stride())
        require(fits, argument, f"has scales or minimums of another shape than {groups}, or of other strides")
