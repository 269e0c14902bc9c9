"""Attention of prompts and trees against the definition in float64, and that against torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.attention_reference import dequantize_kv, reference_attention
from meshlm.kernels.gpu import attention_checks, prefill_attention_hopper
from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.configs import Config
from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer
from meshlm.kernels.gpu.prefill_attention import default_splits, prefill_attention, variants
from tests.kernels.gpu.attention_cases import FORMATS, filled_layer, relative_error, tables_of, tolerance

Case = tuple[torch.Tensor, KvLayer, torch.Tensor, torch.Tensor, torch.Tensor]


def launch(rows: int = 16, tile: int = 16, splits: int = 1) -> Config:
    return {"ROWS": rows, "TILE": tile, "SPLITS": splits, "num_warps": 4, "num_stages": 2}


def described(rows: int = 16, tile: int = 16, programs: int = 3) -> Config:
    """Of the kernel with tensor descriptors."""
    return {"ROWS": rows, "TILE": tile, "PROGRAMS": programs, "SPECIALIZED": 0, "num_warps": 4, "num_stages": 2}


def case(
    sequences: list[tuple[int, int]],
    kv_format: KvFormat,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    device: torch.device,
) -> Case:
    """sequences: (tokens cached before, queries) of each."""
    lengths = [before + queries for before, queries in sequences]
    width = max(1, -(-max(lengths) // block_size)) + 1
    blocks = sum(-(-length // block_size) for length in lengths) + 2
    tables = tables_of(lengths, width, blocks, block_size, device)
    layer = filled_layer(kv_format, kv_heads, block_size, head_dim, lengths, tables, blocks)
    starts = torch.tensor([0, *(queries for _, queries in sequences)]).cumsum(0).to(device, torch.int32)
    query = torch.randn(int(starts[-1]), heads, head_dim, device=device)
    return query, layer, tables, starts, torch.tensor(lengths, dtype=torch.int32, device=device)


def ours(arguments: Case, **rest: Any) -> torch.Tensor:
    most = int(arguments[3].diff().max())
    return prefill_attention(*arguments, 0.3, **{"most_queries": most, "config": launch(), **rest})


def random_tree(nodes: int, device: torch.device) -> torch.Tensor:
    """(nodes,) int64: each node sees itself and what its parent, a random one before it, sees."""
    masks: list[int] = []
    for node in range(nodes):
        parent = int(torch.randint(-1, node, ())) if node else -1
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << node)
    return torch.tensor([mask - (1 << 64) if mask >> 63 else mask for mask in masks], device=device)


@pytest.fixture
def always_described(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("needs TMA")
    monkeypatch.setattr(prefill_attention_hopper, "suits", lambda *_: True)


@pytest.mark.parametrize(
    ("kv_format", "head_dim"),
    [*((kv_format, 64) for kv_format in FORMATS), ("float16", 96), ("int4", 96), ("float16", 128), ("fp8", 256)],
)
def test_every_format_and_head_size_gives_what_the_definition_gives(
    kv_format: KvFormat, head_dim: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(head_dim)
    query, *rest = case([(23, 9), (0, 5)], kv_format, 4, 2, head_dim, 16, device)
    for dtype in dtypes:
        arguments = (query.to(dtype), *rest)
        found = ours(arguments)
        assert found.dtype == dtype
        assert relative_error(found, reference_attention(*arguments, 0.3)) < tolerance(dtype)


@st.composite
def options(draw: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        "window": draw(st.sampled_from([None, 1, 5, 16, 40])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "sink_tokens": draw(st.sampled_from([0, 3, 17])),
    }


@given(data=st.data())
@settings(max_examples=9, deadline=None, derandomize=True)
def test_any_chunks_give_what_the_definition_gives(data: st.DataObject, device: torch.device) -> None:
    chunks = st.tuples(st.sampled_from([0, 1, 16, 41]), st.integers(0, 20))
    sequences = data.draw(st.lists(chunks, min_size=1, max_size=2), "sequences")
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (1, 8)]), "heads")
    kv_format, size = (
        data.draw(st.sampled_from(FORMATS), "format"),
        data.draw(st.sampled_from([16, 24, 32]), "head_dim"),
    )
    block_size = data.draw(st.sampled_from([1, 4, 16, 64]), "block size")
    query, *rest = case(sequences, kv_format, kv_heads * group, kv_heads, size, block_size, device)
    arguments = (torch.cat([query, query], 1)[:, : kv_heads * group], *rest)  # rows apart
    chosen = data.draw(options(), "options")
    chosen["sink_logits"] = data.draw(st.sampled_from([None, torch.randn(kv_heads * group, device=device)]), "sinks")
    config = launch(
        data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([16, 32])), data.draw(st.integers(1, 2))
    )
    found = ours(arguments, config=config, **chosen)
    assert relative_error(found, reference_attention(*arguments, 0.3, **chosen)) < tolerance(torch.float32)


@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_a_tree_sees_its_own_branches_only(data: st.DataObject, device: torch.device) -> None:
    nodes = data.draw(st.sampled_from([1, 7, 64]), "nodes")
    before = data.draw(st.sampled_from([0, 3, 16, 41]), "before")
    arguments = case([(before, nodes), (5, min(3, nodes))], "float32", 2, 1, 16, 8, device)
    chosen = data.draw(options(), "options")
    torch.manual_seed(nodes)
    tree = torch.cat([random_tree(nodes, device), random_tree(min(3, nodes), device)])
    found = ours(arguments, tree=tree, config=launch(32, splits=data.draw(st.integers(1, 2))), **chosen)
    assert relative_error(found, reference_attention(*arguments, 0.3, tree=tree, **chosen)) < tolerance(torch.float32)


def test_a_tree_of_one_branch_is_a_chunk(device: torch.device) -> None:
    arguments = case([(20, 7)], "float32", 4, 2, 32, 16, device)
    chain = torch.tensor([(1 << node + 1) - 1 for node in range(7)], device=device)
    torch.testing.assert_close(ours(arguments, tree=chain), ours(arguments), atol=1e-6, rtol=1e-5)


@pytest.mark.usefixtures("always_described")
@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_the_kernel_with_tensor_descriptors_gives_the_same(data: st.DataObject, device: torch.device) -> None:
    sequences = data.draw(st.lists(st.tuples(st.sampled_from([0, 16, 41]), st.integers(0, 20)), min_size=1, max_size=2))
    query, layer, *rest = case(sequences, "float16", 3, 1, 32, data.draw(st.sampled_from([16, 64])), device)
    arguments = (query.half(), layer, *rest)
    chosen = data.draw(options(), "options")
    config = described(data.draw(st.sampled_from([16, 32])), 16, data.draw(st.integers(1, 5)))
    found = ours(arguments, config=config, **chosen)
    assert relative_error(found, reference_attention(*arguments, 0.3, **chosen)) < tolerance(torch.float16)


@pytest.mark.usefixtures("always_described")
def test_the_kernel_with_tensor_descriptors_takes_trees(device: torch.device) -> None:
    query, *rest = case([(40, 9)], "float16", 2, 1, 64, 16, device)
    arguments, tree = (query.half(), *rest), random_tree(9, device)
    found = ours(arguments, tree=tree, config=described())
    assert relative_error(found, reference_attention(*arguments, 0.3, tree=tree)) < tolerance(torch.float16)


def test_tensor_descriptors_are_for_what_they_suit(device: torch.device) -> None:
    query, layer, *_ = case([(0, 70)], "float16", 4, 2, 64, 64, device)
    suits, half = prefill_attention_hopper.suits, query.half()
    assert suits(half, layer, 140, (9, 0))
    assert not suits(half, layer, 140, (8, 0))
    assert not suits(query, layer, 140, (9, 0))
    assert not suits(half, layer, 32, (9, 0))
    for other in (("int8", 64, 64), ("float16", 96, 64), ("float16", 64, 16)):
        assert not suits(half, case([(0, 1)], other[0], 4, 2, other[1], other[2], device)[1], 140, (9, 0))
    large = case([(0, 1)], "float16", 4, 2, 256, 64, device)[1]
    assert suits(half, large, 140, (9, 0))
    assert not suits(half, large, 140, (10, 0))


def test_a_prompt_gives_the_same_in_chunks(device: torch.device) -> None:
    query, layer, tables, _, lengths = case([(0, 50)], "float32", 4, 2, 32, 16, device)
    whole = ours((query, layer, tables, torch.tensor([0, 50], dtype=torch.int32, device=device), lengths))
    for begin, end in ((0, 13), (13, 32), (32, 50)):
        starts = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        held = torch.tensor([end], dtype=torch.int32, device=device)
        chunk = ours((query[begin:end], layer, tables, starts, held))
        torch.testing.assert_close(chunk, whole[begin:end], atol=1e-6, rtol=1e-5)


def test_it_writes_its_sequences_rows_and_no_others(device: torch.device) -> None:
    query, layer, tables, starts, lengths = case([(20, 5), (0, 4)], "float32", 4, 2, 32, 16, device)
    padded = torch.cat([query, query[:3]])
    memory = torch.full((12, 6, 32), 7.0, device=device)
    ours((padded, layer, tables, starts, lengths), out=memory[:, 1:5])
    wanted = reference_attention(query, layer, tables, starts, lengths, 0.3)
    assert relative_error(memory[:9, 1:5], wanted) < tolerance(torch.float32)
    assert bool((memory[9:] == 7.0).all())
    assert bool((memory[:, [0, 5]] == 7.0).all())


def test_queries_of_a_sequence_without_tokens_are_zero(device: torch.device) -> None:
    arguments = case([(20, 5), (0, 4)], "float32", 4, 2, 32, 16, device)
    arguments[4][1] = 0
    found = ours(arguments)
    assert bool((found[5:] == 0).all())
    assert relative_error(found, reference_attention(*arguments, 0.3)) < tolerance(torch.float32)


def test_a_wrong_table_or_length_reads_nothing_foreign(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody can look at them before the launch. Reading beyond the cache would end this process."""
    monkeypatch.setattr(attention_checks, "_check_values", lambda *_: None)
    arguments = case([(40, 4), (20, 4)], "float32", 4, 2, 32, 16, device)
    right = ours(arguments)
    arguments[2][0] = torch.tensor([-5, 1 << 30, arguments[1].blocks, 3], device=device)
    arguments[4][0] = 1 << 20
    torch.testing.assert_close(ours(arguments)[4:], right[4:])


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("query", {"query": torch.randn(9, 5, 32)}),
        ("tables", {"tables": torch.full((2, 4), 99, dtype=torch.int32)}),
        ("starts", {"starts": torch.tensor([0, 9], dtype=torch.int32)}),
        ("starts", {"starts": torch.tensor([0, 5, 9])}),
        ("starts", {"starts": torch.tensor([0, 5, 10], dtype=torch.int32)}),
        ("lengths", {"lengths": torch.tensor([25, 3], dtype=torch.int32)}),
        ("most_queries", {"most_queries": -1}),
        ("most_queries", {"most_queries": 4}),
        ("tree", {"tree": torch.zeros(9, dtype=torch.int32)}),
        ("tree", {"tree": torch.zeros(8, dtype=torch.int64)}),
        ("tree", {"tree": torch.zeros(9, dtype=torch.int64), "most_queries": 65}),
        ("window", {"window": -1}),
        ("out", {"out": torch.zeros(9, 4, 16)}),
    ],
)
def test_a_wrong_argument_is_named(argument: str, change: dict[str, Any], device: torch.device) -> None:
    names = ("query", "layer", "tables", "starts", "lengths")
    right = dict(zip(names, case([(20, 5), (0, 4)], "float32", 4, 2, 32, 16, device), strict=True))
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    alike = all(
        value.dtype == right[name].dtype and value.shape == right[name].shape  # type: ignore[union-attr]
        for name, value in moved.items()
        if name in ("tables", "starts", "lengths")
    )
    if device.type != "cpu" and alike and argument in ("tables", "starts", "lengths", "most_queries"):
        pytest.skip("values are not looked at on a GPU")
    with pytest.raises(ArgumentError) as error:
        prefill_attention(**{**right, "scale": 0.3, "most_queries": 5, **moved})
    assert error.value.argument == argument


@pytest.mark.oracle
def test_the_definition_is_what_torch_computes() -> None:
    torch.manual_seed(0)
    arguments = case([(20, 9)], "int4", 6, 2, 32, 16, torch.device("cpu"))
    query, layer, tables = arguments[:3]
    tree = random_tree(9, torch.device("cpu"))
    keys, values = (
        part[tables[0, :2].long()].transpose(0, 1).reshape(2, 32, 32)[:, :29] for part in dequantize_kv(layer)
    )
    before = torch.ones(9, 20, dtype=torch.bool)
    branches = (tree[:, None] >> torch.arange(9) & 1).bool()
    for own, seen in ((None, torch.ones(9, 9, dtype=torch.bool).tril()), (tree, branches)):
        theirs = torch.nn.functional.scaled_dot_product_attention(
            query.double().transpose(0, 1),
            keys.repeat_interleave(3, 0),
            values.repeat_interleave(3, 0),
            attn_mask=torch.cat([before, seen], 1),
            scale=0.3,
        )
        torch.testing.assert_close(reference_attention(*arguments, 0.3, tree=own), theirs.transpose(0, 1))


def test_contexts_are_split_only_where_there_is_too_little_to_do() -> None:
    assert default_splits(128, rows=4096 * 4, others=8, tokens=1 << 17, processors=132) == 1
    assert default_splits(128, rows=8 * 4, others=8, tokens=1 << 17, processors=132) > 16
    assert default_splits(128, rows=8 * 4, others=8, tokens=128, processors=132) == 1


def test_variants_have_names_of_their_own_and_all_that_the_kernel_takes() -> None:
    found = [*variants(), *prefill_attention_hopper.variants()]
    assert len({variant.name for variant in found}) == len(found)
    for variant in found:
        assert set(variant.kernel.arg_names) <= set(variant.types) | set(variant.constants)
