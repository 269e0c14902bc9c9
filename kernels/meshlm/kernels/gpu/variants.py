"""What serving compiles of a kernel: enough to compile it without a GPU, see `compile.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Compute capabilities, as of A100; A10 and RTX 30; L4, L40 and RTX 40; H100; B200; RTX 50 and RTX PRO 6000.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FP8_ARCHITECTURES = (89, 90, 100, 120)


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


def by_config(
    architectures: Iterable[int], config_of: Callable[[int], Mapping[str, int]]
) -> Iterator[tuple[str, dict[str, int], tuple[int, ...]]]:
    """The configurations that these architectures are launched in, each once: what to add to a variant's name (nothing
    where sm_90 is among them), the configuration, and whose it is."""
    served: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for architecture in architectures:
        served.setdefault(tuple(config_of(architecture).items()), []).append(architecture)
    for items, whose in served.items():
        suffix = "" if 90 in whose else "/sm_" + "_".join(map(str, whose))
        yield suffix, dict(items), tuple(whose)
