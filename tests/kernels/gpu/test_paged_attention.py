"""Decode attention against the definition in float64, and that against torch's."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.attention_reference import dequantize_kv, reference_attention
from meshlm.kernels.gpu import attention_checks
from meshlm.kernels.gpu import paged_attention as module
from meshlm.kernels.gpu.attention_splits import LEAST_TILES, MOST_SPLITS, split_count
from meshlm.kernels.gpu.attention_tile import parts
from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.configs import Config
from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer
from meshlm.kernels.gpu.paged_attention import default_config, paged_attention, variants
from tests.kernels.gpu.attention_cases import FORMATS, filled_layer, relative_error, tables_of, tolerance


def launch(tile: int = 16, splits: int = 1) -> Config:
    return {"TILE": tile, "SPLITS": splits, "num_warps": 4, "num_stages": 2}


def case(
    lengths: list[int],
    kv_format: KvFormat,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    device: torch.device,
) -> tuple[torch.Tensor, KvLayer, torch.Tensor, torch.Tensor]:
    width = max(1, -(-max(lengths) // block_size)) + 1
    blocks = sum(-(-length // block_size) for length in lengths) + 2
    tables = tables_of(lengths, width, blocks, block_size, device)
    layer = filled_layer(kv_format, kv_heads, block_size, head_dim, lengths, tables, blocks)
    query = torch.randn(len(lengths), heads, head_dim, device=device)
    return query, layer, tables, torch.tensor(lengths, dtype=torch.int32, device=device)


def expected(
    query: torch.Tensor, layer: KvLayer, tables: torch.Tensor, lengths: torch.Tensor, **rest: Any
) -> torch.Tensor:
    starts = torch.arange(len(query) + 1)
    return reference_attention(query, layer, tables, starts, lengths, 0.3, **rest)


@pytest.mark.parametrize(
    ("kv_format", "head_dim"),
    [(kv_format, 64) for kv_format in FORMATS] + list(product(("float16", "int4"), (96, 128, 256))),
)
def test_every_format_and_head_size_gives_what_the_definition_gives(
    kv_format: KvFormat, head_dim: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(head_dim)
    query, layer, tables, lengths = case([1, 37], kv_format, 6, 2, head_dim, 16, device)
    for dtype in dtypes:
        narrow = query.to(dtype)
        ours = paged_attention(narrow, layer, tables, lengths, 0.3, config=launch())
        assert ours.dtype == dtype
        assert relative_error(ours, expected(narrow, layer, tables, lengths)) < tolerance(dtype)


@given(data=st.data())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_shape_gives_what_the_definition_gives(data: st.DataObject, device: torch.device) -> None:
    lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=3), "lengths")
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (1, 8), (3, 1), (1, 20)]), "heads")
    kv_format = data.draw(st.sampled_from(FORMATS), "format")
    head_dim, block_size = data.draw(st.sampled_from([16, 24, 32, 40])), data.draw(st.sampled_from([1, 2, 8, 32, 128]))
    query, layer, tables, held = case(lengths, kv_format, kv_heads * group, kv_heads, head_dim, block_size, device)
    query = torch.cat([query, query], 1)[:, : kv_heads * group]  # rows apart
    options: dict[str, Any] = {
        "window": data.draw(st.sampled_from([None, 1, 5, 16, 40, 1000]), "window"),
        "softcap": data.draw(st.sampled_from([None, 2.0]), "softcap"),
        "sink_tokens": data.draw(st.sampled_from([0, 1, 4, 17]), "sink tokens"),
        "sink_logits": data.draw(st.sampled_from([None, torch.randn(kv_heads * group, device=device)]), "sinks"),
    }
    config = launch(data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([1, 2, 5])))
    ours = paged_attention(query, layer, tables, held, 0.3, **options, config=config)
    wanted = expected(query, layer, tables, held, **options)
    assert relative_error(ours, wanted) < tolerance(torch.float32)
    assert bool((ours[held == 0] == 0).all())


@pytest.mark.parametrize("splits", [2, 3, 7, 11])
@pytest.mark.parametrize("length", [0, 1, 16 * LEAST_TILES, 16 * LEAST_TILES + 1, 300])
def test_a_split_context_gives_what_a_whole_one_gives(length: int, splits: int, device: torch.device) -> None:
    torch.manual_seed(length)
    query, layer, tables, lengths = case([length, 77], "float32", 4, 2, 32, 16, device)
    whole = paged_attention(query, layer, tables, lengths, 0.3, config=launch())
    split = paged_attention(query, layer, tables, lengths, 0.3, config=launch(splits=splits))
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)


def test_it_writes_where_it_is_told_and_nowhere_else(device: torch.device) -> None:
    query, layer, tables, lengths = case([20, 0, 33], "float32", 4, 2, 32, 16, device)
    memory = torch.full((3, 6, 32), 7.0, device=device)
    out = paged_attention(query, layer, tables, lengths, 0.3, out=memory[:, 1:5])
    assert out.data_ptr() == memory[:, 1:5].data_ptr()
    assert relative_error(out, expected(query, layer, tables, lengths)) < tolerance(torch.float32)
    assert bool((memory[:, [0, 5]] == 7.0).all())


def test_no_sequences_are_no_launch(device: torch.device) -> None:
    query, layer, tables, lengths = case([20], "float32", 4, 2, 32, 16, device)
    assert paged_attention(query[:0], layer, tables[:0], lengths[:0], 0.3).shape == (0, 4, 32)


def test_a_wrong_table_or_length_reads_nothing_foreign(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody can look at them before the launch. Reading beyond the cache would end this process."""
    monkeypatch.setattr(attention_checks, "_check_values", lambda *_: None)
    query, layer, tables, lengths = case([40, 40], "float32", 4, 2, 32, 16, device)
    right = paged_attention(query, layer, tables, lengths, 0.3)
    tables[0] = torch.tensor([-5, 1 << 30, layer.blocks, 3], device=device)
    lengths[0] = 1 << 20
    torch.testing.assert_close(paged_attention(query, layer, tables, lengths, 0.3)[1], right[1])


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("query", {"query": torch.randn(2, 4, 32, dtype=torch.float64)}),
        ("query", {"query": torch.randn(2, 4, 64)[:, :, ::2]}),
        ("query", {"query": torch.randn(2, 5, 32)}),
        ("query", {"query": torch.randn(2, 4, 48)}),
        ("tables", {"tables": torch.zeros(2, 3, dtype=torch.int64)}),
        ("tables", {"tables": torch.full((2, 4), 99, dtype=torch.int32)}),
        ("lengths", {"lengths": torch.tensor([1], dtype=torch.int32)}),
        ("lengths", {"lengths": torch.tensor([1, 65], dtype=torch.int32)}),
        ("window", {"window": 0}),
        ("softcap", {"softcap": 0.0}),
        ("sink_tokens", {"sink_tokens": -1}),
        ("sink_logits", {"sink_logits": torch.zeros(2)}),
        ("out", {"out": torch.zeros(2, 4, 32, dtype=torch.float16)}),
    ],
)
def test_a_wrong_argument_is_named(argument: str, change: dict[str, Any], device: torch.device) -> None:
    query, layer, tables, lengths = case([40, 40], "float32", 4, 2, 32, 16, device)
    given_arguments = {"query": query, "layer": layer, "tables": tables, "lengths": lengths, "scale": 0.3}
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    if device.type != "cpu" and argument in ("tables", "lengths") and len(next(iter(moved.values()))) == 2:
        pytest.skip("values are not looked at on a GPU")
    with pytest.raises(ArgumentError) as error:
        paged_attention(**(given_arguments | moved))
    assert error.value.argument == argument


@pytest.mark.parametrize("part", ["keys", "values", "key_scales", "value_scales"])
def test_a_layer_that_is_not_what_it_says_is_refused(part: str, device: torch.device) -> None:
    query, layer, tables, lengths = case([40, 40], "int8", 4, 2, 32, 16, device)
    fields = {name: getattr(layer, name) for name in ("keys", "values", "key_scales", "value_scales")}
    for wrong in (fields[part].float(), fields[part][:, :1], fields[part].repeat_interleave(2, 1)[:, ::2]):
        with pytest.raises(ArgumentError) as error:
            paged_attention(query, KvLayer("int8", **(fields | {part: wrong})), tables, lengths, 0.3)
        assert error.value.argument.startswith("layer")


def test_blocks_of_no_power_of_two_are_refused(device: torch.device) -> None:
    query, layer, tables, lengths = case([40, 40], "float32", 4, 2, 32, 12, device)
    with pytest.raises(ArgumentError, match="power of two"):
        paged_attention(query, layer, tables, lengths, 0.3)


def test_fp8_on_an_old_device_is_refused_by_its_capability(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    _, layer, _, _ = case([1], "fp8", 4, 2, 32, 16, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(attention_checks, "require_tensor", lambda *_, **__: None)
    with pytest.raises(ArgumentError, match=r"needs compute capability 8\.9") as error:
        attention_checks.check_layer(layer, torch.device("cuda"))
    assert error.value.argument == "layer"


@pytest.mark.oracle
@pytest.mark.parametrize("window", [None, 9])
def test_the_definition_is_what_torch_computes(window: int | None) -> None:
    torch.manual_seed(0)
    query, layer, tables, lengths = case([40], "int8", 6, 2, 32, 16, torch.device("cpu"))
    ours = expected(query, layer, tables, lengths, window=window)
    keys, values = (
        part[tables[0, :3].long()].transpose(0, 1).reshape(2, 48, 32)[:, :40] for part in dequantize_kv(layer)
    )
    seen = torch.arange(40) >= (0 if window is None else 40 - window)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query[0].double().unsqueeze(1),
        keys.repeat_interleave(3, 0),
        values.repeat_interleave(3, 0),
        attn_mask=seen.unsqueeze(0),
        scale=0.3,
    )
    torch.testing.assert_close(ours[0], theirs.squeeze(1))


def test_learned_sinks_are_a_token_without_a_value() -> None:
    query, layer, tables, lengths = case([5], "float32", 1, 1, 16, 8, torch.device("cpu"))
    plain = expected(query, layer, tables, lengths)
    keys, _ = dequantize_kv(layer)
    scores = keys[tables[0, 0], 0, :5] @ query[0, 0].double() * 0.3
    share = scores.exp().sum() / (scores.exp().sum() + 1)  # a sink of 0 weighs exp(0)
    torch.testing.assert_close(expected(query, layer, tables, lengths, sink_logits=torch.zeros(1)), plain * share)


def test_parts_of_a_head_are_powers_of_two_and_cover_it() -> None:
    assert parts("bfloat16", 96) == (64, 64, 32)
    assert parts("bfloat16", 128) == (128, 128, 0)
    assert parts("int4", 96) == (48, 64, 64)
    for head_dim in range(8, 257, 8):
        first, width0, width1 = parts("int8", head_dim)
        assert first <= width0
        assert head_dim - first <= width1
        assert all(width & (width - 1) == 0 for width in (width0, width1))


@given(programs=st.integers(1, 10_000), tiles=st.integers(0, 5000), processors=st.integers(1, 200))
def test_splits_fill_the_device_but_are_not_shorter_than_worth_it(programs: int, tiles: int, processors: int) -> None:
    splits = split_count(programs, tiles, processors, 8)
    assert 1 <= splits <= MOST_SPLITS
    assert splits == 1 or (splits - 1) * LEAST_TILES < tiles
    if splits < min(MOST_SPLITS, tiles // LEAST_TILES):
        assert splits * programs >= 8 * processors


def test_a_long_table_is_split_even_where_sequences_are_many() -> None:
    tiles = (1 << 17) // default_config(128)["TILE"]
    assert split_count(256 * 8, tiles, 132, default_config(128)["WAVES"]) >= 4


def test_what_is_tuned_for_decode_holds_for_tables_of_any_width(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serving has tables as wide as its longest context, and the tuner has those of its cases."""
    asked = []

    def choose(kernel: str, key: tuple[int, ...], default: object, on: torch.device) -> object:
        asked.append((kernel, key))
        return default

    monkeypatch.setattr(module, "choose", choose)
    query, layer, tables, lengths = case([5, 9], "float32", 2, 1, 16, 8, device)
    wide = torch.nn.functional.pad(tables, (0, 40))
    for table in (tables, wide):
        paged_attention(query, layer, table, lengths, 0.3)
    assert asked[0] == asked[1]
    assert asked[0][1][-1] == 2  # sequences, rounded up


def test_variants_have_names_of_their_own_and_all_that_the_kernel_takes() -> None:
    found = list(variants())
    assert len({variant.name for variant in found}) == len(found)
    for variant in found:
        assert set(variant.kernel.arg_names) <= set(variant.types) | set(variant.constants)
