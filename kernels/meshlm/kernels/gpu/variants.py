"""What serving compiles of a kernel: enough to compile it without a GPU, see `compile.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES = (80, 90, 100)  # compute capabilities, as of A100, H100, B200


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel with its constants, the types of its other arguments, and how it is launched.

    types: by parameter, as Triton spells them: "*bf16" a pointer, "i32", "fp32", "tensordesc<bf16[64,64]>"; with ":16"
    behind it an address or number that 16 divides, as the launcher specializes it. May name more than the kernel has.
    constants: of the other parameters; an argument that is None, or the number 1, is one too.
    options: of the launch, `num_warps` and `num_stages`.
    """

    name: str  # unique: the operation, and what sets this variant apart
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    hot: bool = True  # run for every token: spilled registers are an error
    architectures: tuple[int, ...] = ARCHITECTURES
