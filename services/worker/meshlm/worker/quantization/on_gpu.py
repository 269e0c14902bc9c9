"""Which format each weight matrix gets on a GPU, and the matrix in it, quantized on the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.matrix import Matrix, pack
from meshlm.kernels.gpu.quantize import quantize
from meshlm.kernels.quantize import GROUP
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.quantization.cache import plan_for
from meshlm.worker.quantization.plan import AUTO, NONE, Format, Plan, kind_of, own_blocks

# Float weights that were not measured stay floats here: memory that quantizing saves is not what a GPU lacks first.
_AUTO = Plan("auto", Format.DENSE)


@dataclass(frozen=True, slots=True)
class MatricesOnGpu:
    """A checkpoint's matrices as the config wants them, on `device`; floats in `dtype`."""

    checkpoint: Checkpoint
    plan: Plan
    fp8: bool
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def planned(
        cls,
        checkpoint: Checkpoint,
        model: Path,
        quantization: Literal["auto", "none", "int8", "int4", "fp8"],
        device: torch.device,
        dtype: torch.dtype,
    ) -> MatricesOnGpu:
        """`model`: the checkpoint's path, by which a measured plan is found."""
        plan = NONE if quantization == "fp8" else plan_for(quantization, model)
        return cls(checkpoint, _AUTO if plan is AUTO else plan, quantization == "fp8", device, dtype)

    @property
    def name(self) -> str:
        return "fp8" if self.fp8 else self.plan.name

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Raises ModelFileError: missing, of another shape, or not to be quantized (values that are not finite)."""
        blocks = own_blocks(self.checkpoint, name, rows, cols, self.plan)
        if blocks is not None:
            return pack(blocks, device=self.device)
        weight, wanted = self.checkpoint.tensor(name, rows, cols), self.plan.format_of(name)
        if self.fp8 and kind_of(name) not in ("embedding", "head"):
            return self._quantized(name, weight, "fp8")
        if wanted is Format.DENSE or self.fp8:
            return weight.to(self.device, self.dtype, copy=True)
        return self._quantized(name, weight, "int8" if wanted is Format.INT8 else "int4", wanted is Format.INT4)

    def _quantized(
        self, name: str, weight: torch.Tensor, wanted: Literal["int4", "int8", "fp8"], minimum: bool = False
    ) -> Matrix:
        importance = self.plan.importance.get(name)
        try:
            return quantize(
                weight.to(self.device),
                wanted,
                group=None if wanted == "fp8" else GROUP,
                minimum=minimum,
                importance=None if importance is None else importance.to(self.device, torch.float32),
            )
        except ArgumentError as error:
            raise ModelFileError(self.checkpoint.path, f"{name} cannot be quantized: {error}") from None
