"""Decode and prefill attention over a paged cache, against a token-by-token definition in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from meshlm.kernels.kv_cache import allocate_kv_cache, gather_kv, reference_store_kv, store_kv
from meshlm.kernels.paged_attention import paged_attention, plan_decode, reference_paged_attention, rounded_length
from meshlm.kernels.prefill_attention import padded_blocks, prefill_attention, reference_prefill_attention

CPU = torch.device("cpu")
HEAD_DIM = 16


def filled_cache(kv_heads: int, blocks: int, block_size: int) -> torch.Tensor:
    cache = allocate_kv_cache(1, kv_heads, blocks, block_size, HEAD_DIM, torch.float32, CPU)[0]
    return cache.normal_()


def tables_for(lengths: list[int], block_size: int, blocks: int) -> list[list[int]]:
    """Disjoint tables of shuffled block numbers."""
    free = list(range(blocks))
    random.Random(0).shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_size))] for length in lengths]


def test_store_puts_every_head_of_every_token_into_its_slot() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.zeros(2, 3, 5, 4, HEAD_DIM), torch.zeros(2, 3, 5, 4, HEAD_DIM)
    slots, kv = torch.tensor([17, 0, 5, 19, 6]), torch.randn(5, 6, HEAD_DIM)
    store_kv(ours, slots, kv)
    reference_store_kv(theirs, slots, kv)
    assert torch.equal(ours, theirs)
    keys, values = gather_kv(ours, torch.tensor([4, 1]))
    assert torch.equal(keys[:, 1], kv[0, :3])
    assert torch.equal(values[:, 3], kv[3, 3:])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("block_size", [4, 16, 128])
def test_decode_equals_the_definition_for_ragged_lengths(heads: int, kv_heads: int, block_size: int) -> None:
    torch.manual_seed(1)
    lengths = [1, 3, 64, 65, 100, 127, 128, 129, 300]
    cache = filled_cache(kv_heads, 260, block_size)
    tables = tables_for(lengths, block_size, 260)
    query = torch.randn(len(lengths), heads, HEAD_DIM)
    groups = plan_decode(tables, lengths, block_size, kv_heads, torch.float32, CPU)
    expected = reference_paged_attention(query, cache, tables, lengths, 0.25)
    torch.testing.assert_close(paged_attention(query, cache, groups, 0.25), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 5, 64, 100, 1000])
@pytest.mark.parametrize("block_size", [4, 16, 128])
def test_decode_with_a_window_sees_only_the_latest_tokens(block_size: int, window: int) -> None:
    torch.manual_seed(1)
    lengths = [1, 5, 6, 63, 64, 65, 101, 163, 164, 165, 300]
    cache = filled_cache(2, 320, block_size)
    tables = tables_for(lengths, block_size, 320)
    query = torch.randn(len(lengths), 6, HEAD_DIM)
    groups = plan_decode(tables, lengths, block_size, 2, torch.float32, CPU, window)
    expected = reference_paged_attention(query, cache, tables, lengths, 0.25, window)
    torch.testing.assert_close(paged_attention(query, cache, groups, 0.25), expected, atol=2e-6, rtol=1e-5)


def test_decode_with_a_window_reads_no_more_blocks_than_the_window_needs() -> None:
    [group] = plan_decode([list(range(1000))], [16_000], 16, 2, torch.float32, CPU, window=100)
    assert len(group.blocks) * 16 <= 128
    assert int(group.blocks.max()) == 999
    assert int(group.blocks[0]) == (16_000 - 100) // 16


def test_long_sequences_of_one_window_are_one_group() -> None:
    lengths = list(range(200, 230))
    groups = plan_decode([list(range(20))] * 30, lengths, 16, 2, torch.float32, CPU, window=100)
    assert len(groups) == 1


def test_decode_of_a_row_is_the_same_bits_alone_and_among_others() -> None:
    torch.manual_seed(2)
    lengths = [5, 70, 70, 71, 200, 500]
    cache = filled_cache(3, 100, 16)
    tables = tables_for(lengths, 16, 100)
    query = torch.randn(len(lengths), 9, HEAD_DIM)
    together = paged_attention(query, cache, plan_decode(tables, lengths, 16, 3, torch.float32, CPU), 0.25)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        alone = plan_decode([table], [length], 16, 3, torch.float32, CPU)
        assert torch.equal(paged_attention(query[row : row + 1], cache, alone, 0.25)[0], together[row])


def test_rounded_lengths_waste_at_most_a_quarter_beyond_the_first_tile() -> None:
    for length in range(1, 20_000):
        rounded = rounded_length(length, 16)
        assert length <= rounded < max(length * 1.25 + 1, length + 64)
        assert rounded % 64 == 0


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 64), (0, 100), (63, 2), (64, 64), (37, 90), (130, 1)])
def test_prefill_equals_the_definition_for_any_chunk(heads: int, kv_heads: int, start: int, count: int) -> None:
    torch.manual_seed(3)
    cache = filled_cache(kv_heads, 40, 8)
    [table] = tables_for([start + count], 8, 40)
    query = torch.randn(count, heads, HEAD_DIM)
    blocks = torch.tensor(padded_blocks(table, start + count, 8))
    expected = reference_prefill_attention(query, cache, table, start, 0.25)
    torch.testing.assert_close(prefill_attention(query, cache, blocks, start, 0.25), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize(("start", "count"), [(0, 70), (63, 2), (100, 64), (230, 1)])
def test_prefill_with_a_window_sees_only_the_latest_tokens(window: int, start: int, count: int) -> None:
    torch.manual_seed(3)
    cache = filled_cache(2, 40, 8)
    [table] = tables_for([start + count], 8, 40)
    query = torch.randn(count, 6, HEAD_DIM)
    blocks = torch.tensor(padded_blocks(table, start + count, 8))
    expected = reference_prefill_attention(query, cache, table, start, 0.25, window)
    ours = prefill_attention(query, cache, blocks, start, 0.25, window)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


def test_prefill_gives_the_same_bits_however_it_is_cut() -> None:
    torch.manual_seed(4)
    cache = filled_cache(3, 40, 16)
    [table] = tables_for([230], 16, 40)
    query = torch.randn(230, 9, HEAD_DIM)
    whole = prefill_attention(query, cache, torch.tensor(padded_blocks(table, 230, 16)), 0, 0.25)
    for cuts in ([0, 1, 230], [0, 64, 128, 230], [0, 50, 51, 199, 230]):
        for start, end in itertools.pairwise(cuts):
            blocks = torch.tensor(padded_blocks(table, end, 16))
            assert torch.equal(prefill_attention(query[start:end], cache, blocks, start, 0.25), whole[start:end])
