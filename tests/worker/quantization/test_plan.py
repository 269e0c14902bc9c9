"""What a plan makes of a matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meshlm.kernels.quantize import GroupQuantized, dequantize, quantize_groups
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.quantization.plan import INT4, INT8, NONE, Format, Plan, kind_of, quantized_matrix
from tests.worker.quantization.tiny_models import CONFIG

NAME = "model.layers.0.mlp.up_proj.weight"
ROWS, COLS = 6, 64


def checkpoint(weight: torch.Tensor, blocks: GroupQuantized | None = None) -> Checkpoint:
    return Checkpoint(Path("some.gguf"), CONFIG, {NAME}, {NAME: weight}.__getitem__, lambda name: blocks)


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(2))


def test_none_leaves_a_matrix_dense_even_where_the_file_has_blocks() -> None:
    found = quantized_matrix(checkpoint(weight(), quantize_groups(weight(), 4, True)), NAME, ROWS, COLS, NONE)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, weight())


@pytest.mark.parametrize(("plan", "bits", "minimum"), [(INT8, 8, False), (INT4, 4, True)])
def test_a_float_matrix_gets_the_format_that_was_asked_for(plan: Plan, bits: int, minimum: bool) -> None:
    found = quantized_matrix(checkpoint(weight()), NAME, ROWS, COLS, plan)
    assert isinstance(found, GroupQuantized)
    assert (found.bits, found.minimums is not None) == (bits, minimum)


@pytest.mark.parametrize("plan", [INT8, INT4])
def test_the_files_own_4_bit_blocks_are_taken_as_they_are(plan: Plan) -> None:
    blocks = quantize_groups(weight(), 4, False)
    assert quantized_matrix(checkpoint(weight(), blocks), NAME, ROWS, COLS, plan) is blocks


def test_8_bit_blocks_shrink_only_where_4_bits_were_asked_for() -> None:
    blocks = quantize_groups(weight(), 8, False)
    source = checkpoint(dequantize(blocks), blocks)
    assert quantized_matrix(source, NAME, ROWS, COLS, INT8) is blocks
    shrunk = quantized_matrix(source, NAME, ROWS, COLS, INT4)
    assert isinstance(shrunk, GroupQuantized)
    assert shrunk.bits == 4


def test_a_matrix_without_whole_groups_stays_dense() -> None:
    ragged = torch.randn(3, 40)
    assert quantized_matrix(checkpoint(ragged), NAME, 3, 40, INT4) is ragged


def test_a_named_matrix_wins_over_its_kind_and_the_kind_over_the_default() -> None:
    kinds = {"gate_up": Format.INT8}
    plan = Plan("auto", Format.INT4, {NAME: Format.DENSE}, kinds=kinds)
    assert plan.format_of(NAME) is Format.DENSE
    assert replace(plan, formats={}).format_of(NAME) is Format.INT8
    assert plan.format_of("model.layers.0.mlp.down_proj.weight") is Format.INT4


def test_a_weight_that_is_not_finite_is_refused_by_its_name() -> None:
    bad = weight()
    bad[0, 0] = torch.nan
    with pytest.raises(ModelFileError, match=r"some\.gguf: model\.layers\.0\.mlp\.up_proj\.weight cannot be quantized"):
        quantized_matrix(checkpoint(bad), NAME, ROWS, COLS, INT4)


@pytest.mark.parametrize("blocks", [None, quantize_groups(torch.zeros(ROWS, COLS), 4, True)])
def test_a_matrix_of_another_shape_is_refused(blocks: GroupQuantized | None) -> None:
    with pytest.raises(ModelFileError, match="the config asks for"):
        quantized_matrix(checkpoint(weight(), blocks), NAME, ROWS + 1, COLS, INT4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.11.self_attn.k_proj.weight", "query_key"),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "down"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
    ],
)
def test_kinds_are_read_from_canonical_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind
