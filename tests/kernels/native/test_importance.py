"""Which cached tokens matter, and keeping those: against softmax in float64 and plain Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshlm.kernels.native import ops
from meshlm.kernels.native.cache import Cache, CacheShape, compact
from meshlm.kernels.native.library import Library, Pool, open_library
from tests.kernels.native.libraries import ISAS, needs_libraries

pytestmark = needs_libraries
DTYPES = ["float32", "bfloat16", "bfloat16_pairs", "int8", "int4"]


@pytest.fixture
def pool(library: Library) -> Iterator[Pool]:
    with Pool(library, 2) as pool:
        yield pool


def by_index(scores: torch.Tensor, layer: int, table: list[int], length: int) -> torch.Tensor:
    """Scores of a sequence's cached tokens: (kv_heads, length)."""
    return scores[layer, table].transpose(0, 1).flatten(1)[:, :length]


def attention_received(key: torch.Tensor, q: torch.Tensor, rows: range, scale: float) -> torch.Tensor:
    """The probabilities of q's rows, summed over rows and a group's heads, in float64: (kv_heads, length)."""
    length, kv_heads, _ = key.shape
    group = q.shape[1] // kv_heads
    spread = key.double().repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q.double(), spread) * scale
    hidden = torch.arange(length)[None, :] > torch.arange(length)[:, None]
    p = logits.masked_fill(hidden, -math.inf).softmax(-1)[:, list(rows)]
    return p.sum(1).reshape(kv_heads, group, length).sum(1)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), ("bfloat16", 0.05), ("bfloat16_pairs", 0.05), ("int8", 0.05), ("int4", 0.8)],
)
def test_observed_scores_are_the_probabilities_received(library: Library, dtype: str, tolerance: float) -> None:
    """A prompt in two chunks, then single tokens; slots begin at zero whatever they held before."""
    if dtype == "bfloat16_pairs" and not library.pair_products:
        pytest.skip("this library does not multiply pairs here")
    generator = torch.Generator().manual_seed(5)
    length, kv_heads, group, head_dim = 203, 2, 3, 64
    table = [6, 2, 9, 0, 7, 4, 3]
    cache = Cache(library, CacheShape(2, 10, kv_heads, 32, head_dim, dtype), fill=0xFF)
    key, value = torch.randn(2, length, kv_heads, head_dim, generator=generator)
    ops.store(cache, 1, ops.Rows(table=table, start=0, count=length), key, value)
    q = torch.randn(length, kv_heads * group, head_dim, generator=generator)
    queries = ops.Queries(q=q, scale=0.125, layer=1)
    scores = torch.from_numpy(cache.scores()).fill_(math.nan)
    wanted = torch.zeros(kv_heads, length, dtype=torch.float64)
    for start, end in [(0, 120), (120, 200), (200, 201), (201, 202), (202, 203)]:
        rows = ops.Rows(table=table, row=start, start=start, count=end - start)
        ops.observe(cache, rows, queries, scores, last=32)
        seen = attention_received(key[:end], q[:end], range(max(start, end - 32), end), 0.125)
        wanted[:, :end] += seen
    torch.testing.assert_close(by_index(scores, 1, table, length).double(), wanted, rtol=tolerance, atol=tolerance)
    assert scores[0].isnan().all()
    assert scores[:, [1, 5, 8]].isnan().all()


def kept_tokens(scores: list[float], keep: int, recent: int, pooling: int) -> list[int]:
    older, half = len(scores) - recent, pooling // 2
    pooled = [max(scores[max(0, i - half) : min(older, i + half + 1)]) for i in range(older)]
    best = sorted(range(older), key=lambda i: (-pooled[i], i))[: keep - recent]
    return sorted(best) + list(range(older, len(scores)))


@given(
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    length=st.integers(1, 150),
    keep=st.integers(1, 150),
    recent=st.integers(0, 40),
    pooling=st.sampled_from([1, 3, 7]),
    equals=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_kept_tokens_are_those_that_matter_unchanged_and_in_order(
    isa: str, dtype: str, length: int, keep: int, recent: int, pooling: int, equals: bool
) -> None:
    """Every layer and head keeps its own; afterwards its attention is that over the kept tokens, bit for bit."""
    library = open_library(isa)
    assume(dtype != "bfloat16_pairs" or library.pair_products)
    keep, recent = min(keep, length), min(recent, keep, length)
    generator = torch.Generator().manual_seed(length * 151 + keep)
    shape = CacheShape(2, 12, 2, 16, 32, dtype)
    cache, fresh = Cache(library, shape, fill=0xFF), Cache(library, shape, fill=0xFF)
    table = torch.randperm(12, generator=generator)[: -(-length // 16)].tolist()
    key, value = torch.randn(2, 2, length, 2, 32, generator=generator)
    scores = torch.rand(2, 12, 2, 16, generator=generator)
    if equals:
        scores = scores.mul(4).round()
    for layer in range(2):
        ops.store(cache, layer, ops.Rows(table=table, start=0, count=length), key[layer], value[layer])
    before = [by_index(scores, layer, table, length).clone() for layer in range(2)]
    with Pool(library, 2) as pool:
        compact(pool, cache.struct, table, length, keep=keep, recent=recent, scores=scores.numpy(), pooling=pooling)
    q = ops.Queries(q=torch.randn(1, 4, 32, generator=generator), scale=0.2)
    for layer in range(2):
        kept = torch.tensor([kept_tokens(before[layer][h].tolist(), keep, recent, pooling) for h in range(2)])
        chosen = [
            torch.stack([x[layer][kept[h], h] for h in range(2)], 1).contiguous() for x in (key, value)
        ]  # (keep, kv_heads, head_dim)
        ops.store(fresh, layer, ops.Rows(table=table, start=0, count=keep), *chosen)
        last = ops.Rows(table=table, start=keep - 1, count=1)
        request = ops.Queries(q=q.q, scale=q.scale, layer=layer)
        assert torch.equal(ops.attention(cache, last, request), ops.attention(fresh, last, request))
        assert torch.equal(by_index(scores, layer, table, keep), before[layer].gather(1, kept))


def test_scores_that_are_no_number_do_not_break_the_choice(pool: Pool) -> None:
    cache = Cache(pool.library, CacheShape(1, 4, 1, 16, 16), fill=0)
    scores = torch.full((1, 4, 1, 16), math.nan)
    scores[0, :, 0, 5] = 1.0
    compact(pool, cache.struct, [0, 1, 2, 3], 64, keep=6, recent=2, scores=scores.numpy())
    assert scores[0, 0, 0, :4].tolist() == [1.0] * 4


def test_a_table_too_short_and_an_even_pooling_are_refused(pool: Pool) -> None:
    cache = Cache(pool.library, CacheShape(1, 4, 1, 16, 16), fill=0)
    for table, length, pooling in [([0], 17, 1), ([9, 0], 20, 1), ([0, 1], 20, 2), ([0, 1], 20, 0)]:
        with pytest.raises(ValueError, match=r"a table of|pooling"):
            compact(
                pool, cache.struct, table, length, keep=4, recent=1, scores=cache.scores(), pooling=pooling
            )  # fmt: skip
