"""Which format each weight matrix of a model gets, and the matrix in it."""

from __future__ import annotations

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


BITS = {Format.DENSE: 16.0, Format.INT8: 8.5, Format.INT4: 5.0, Format.INT4_SYMMETRIC: 4.5}


@dataclass(frozen=True, slots=True)
class Plan:
    """Formats by a matrix's canonical name; what is not named gets `default`.

    keep_blocks: what a GGUF file has quantized stays exactly as it is, whatever the formats say.
    importance: of a matrix's input columns, (cols,) each; see `quantize_groups`.
    """

    name: str  # as the config has it: none, int8, int4, auto
    default: Format
    formats: Mapping[str, Format] = field(default_factory=dict)
    keep_blocks: bool = True
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def format_of(self, name: str) -> Format:
        return self.formats.get(name, self.default)


NONE = Plan("none", Format.DENSE, keep_blocks=False)
INT8 = Plan("int8", Format.INT8)
# Who asks for 4 bits gets no tensor above them: blocks of more bits are quantized anew.
INT4 = Plan("int4", Format.INT4)


def quantized_matrix(
    checkpoint: Checkpoint, name: str, rows: int, cols: int, plan: Plan
) -> torch.Tensor | GroupQuantized:
    """A matrix as the plan wants it: (rows, cols).

    Dense where the plan says so, and where `cols` is no multiple of GROUP, since groups do not straddle rows.
    Raises ModelFileError: missing, of another shape, or not to be quantized (values that are not finite).
    """
    wanted = plan.format_of(name)
    if wanted is Format.DENSE and not plan.keep_blocks:
        return checkpoint.tensor(name, rows, cols)
    if (blocks := _own_blocks(checkpoint, name, rows, cols, wanted, plan)) is not None:
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


def _own_blocks(
    checkpoint: Checkpoint, name: str, rows: int, cols: int, wanted: Format, plan: Plan
) -> GroupQuantized | None:
    """The file's own blocks where it has some that the plan takes: exact, with no detour through floats."""
    read = getattr(checkpoint, "read_quantized", None)
    blocks: GroupQuantized | None = None if read is None else read(name)
    if blocks is None:
        return None
    if blocks.shape != (rows, cols):
        raise ModelFileError(
            checkpoint.path, f"{name} has the shape {blocks.shape}; the config asks for {(rows, cols)}"
        )
    asked_for_less = plan.name == "int4" and blocks.bits > 4
    return None if asked_for_less else blocks
