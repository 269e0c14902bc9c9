"""Which format each weight matrix of a model gets, and the matrix in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from meshlm.kernels.quantize import GROUP, GroupQuantized, quantize_groups
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError


class Format(StrEnum):
    """How a matrix is kept. Bits a weight, scales included, stand in `BITS`."""

    DENSE = "dense"  # as the file has it
    INT8 = "int8"
    INT4 = "int4"  # with a minimum for each group
    INT4_SYMMETRIC = "int4_symmetric"


_LAYER = re.compile(r"model\.layers\.\d+\..*?(\w+)\.weight")
# Matrices of one kind read the same input, or do the same work: they are measured together.
_KINDS = {
    "q_proj": "query_key",
    "k_proj": "query_key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
    "w1": "gate_up",
    "w3": "gate_up",
    "w2": "down",
}
BITS = {Format.DENSE: 16.0, Format.INT8: 8.5, Format.INT4: 5.0, Format.INT4_SYMMETRIC: 4.5}


def kind_of(name: str) -> str:
    """`down` of `model.layers.3.mlp.down_proj.weight`."""
    if match := _LAYER.fullmatch(name):
        return _KINDS.get(match[1], match[1])
    return "embedding" if "embed" in name else "head"


@dataclass(frozen=True, slots=True)
class Plan:
    """Formats by a matrix's canonical name or else its kind; what is not named gets `default`.

    keep_blocks: what a GGUF file has quantized stays exactly as it is, whatever the formats say, unless it is of more
    than `most_bits` bits.
    importance: of a matrix's input columns, (cols,) each; see `quantize_groups`.
    """

    name: str  # as the config has it: none, int8, int4, auto
    default: Format
    formats: Mapping[str, Format] = field(default_factory=dict)
    keep_blocks: bool = True
    most_bits: int = 8
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kinds: Mapping[str, Format] = field(default_factory=dict)

    def format_of(self, name: str) -> Format:
        return self.formats.get(name) or self.kinds.get(kind_of(name), self.default)


NONE = Plan("none", Format.DENSE, keep_blocks=False)
INT8 = Plan("int8", Format.INT8)
INT4 = Plan("int4", Format.INT4, most_bits=4)  # who asks for 4 bits gets no matrix above them

# For a model that was not measured. docs/quantization.md has the figures behind it.
AUTO = Plan("auto", Format.INT8)


def quantized_matrix(
    checkpoint: Checkpoint, name: str, rows: int, cols: int, plan: Plan
) -> torch.Tensor | GroupQuantized:
    """A matrix as the plan wants it: (rows, cols).

    Dense where the plan says so, and where `cols` is no multiple of GROUP, since groups do not straddle rows.
    Raises ModelFileError: missing, of another shape, or not to be quantized (values that are not finite).
    """
    wanted = plan.format_of(name)
    if (blocks := own_blocks(checkpoint, name, rows, cols, plan)) is not None:
        return blocks
    weight = checkpoint.tensor(name, rows, cols)
    if wanted is Format.DENSE or cols % GROUP:
        return weight
    return quantize(weight, wanted, plan.importance.get(name), f"{checkpoint.path}", name)


def quantize(
    weight: torch.Tensor, wanted: Format, importance: torch.Tensor | None, path: str, name: str
) -> GroupQuantized:
    """`weight` in a format that is not dense. Raises ModelFileError, which names the tensor."""
    bits = 8 if wanted is Format.INT8 else 4
    try:
        return quantize_groups(weight, bits, wanted is Format.INT4, importance)
    except ValueError as error:
        raise ModelFileError(path, f"{name} cannot be quantized: {error}") from None


def own_blocks(checkpoint: Checkpoint, name: str, rows: int, cols: int, plan: Plan) -> GroupQuantized | None:
    """The file's own blocks where it has some that the plan takes: exact, with no detour through floats."""
    if not plan.keep_blocks:
        return None
    blocks = checkpoint.quantized(name, rows, cols)
    if blocks is None or blocks.bits > plan.most_bits:
        return None
    return blocks
