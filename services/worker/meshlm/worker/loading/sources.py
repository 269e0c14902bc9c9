"""Where canonical tensors lie in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshlm.worker.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Source:
    """A stored tensor, or a part of it."""

    stored: str  # its name in the file
    member: int | None = None  # of a stack of matrices, along the first dimension
    rows: tuple[int, int] | None = None  # from, to; None: all


Sources = Mapping[str, Source]  # by canonical names


def cut(stored: str, names_and_rows: list[tuple[str, int]], member: int | None = None) -> dict[str, Source]:
    """Tensors that lie behind one another in the rows of one."""
    found: dict[str, Source] = {}
    start = 0
    for name, rows in names_and_rows:
        found[name] = Source(stored, member, (start, start + rows))
        start += rows
    return found


def cut_qkv(stored: str, prefix: str, kind: str, config: ModelConfig) -> dict[str, Source]:
    """Phi-3's fused projection. prefix: of the layer; kind: "weight" or "bias"."""
    parts = (("q", config.query_size), ("k", config.kv_size), ("v", config.kv_size))
    return cut(stored, [(f"{prefix}.self_attn.{part}_proj.{kind}", rows) for part, rows in parts])


def cut_gate_up(stored: str, prefix: str, kind: str, config: ModelConfig) -> dict[str, Source]:
    names = [f"{prefix}.mlp.{part}_proj.{kind}" for part in ("gate", "up")]
    return cut(stored, [(name, config.intermediate_size) for name in names])


def expert_name(prefix: str, member: int, part: str) -> str:
    """part: "w1" (gate), "w2" (down) or "w3" (up)."""
    return f"{prefix}.block_sparse_moe.experts.{member}.{part}.weight"


def unstack(stored: str, prefix: str, part: str, config: ModelConfig) -> dict[str, Source]:
    """The matrices of all experts in one tensor of three dimensions."""
    return {expert_name(prefix, member, part): Source(stored, member) for member in range(config.experts)}
