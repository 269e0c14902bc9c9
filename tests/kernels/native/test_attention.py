"""Native attention against torch's, over every cache format and instruction set that this machine has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshlm.kernels.native import ops
from meshlm.kernels.native.cache import Cache, CacheShape
from meshlm.kernels.native.library import Library, open_library
from meshlm.kernels.rope import reference_rope, rope_frequencies
from tests.kernels.native.libraries import ISAS, needs_libraries

# Largest error allowed, times the largest value: rounding of sums, then half a step of each format.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "bfloat16_pairs": 1e-2, "int8": 2e-2, "int4": 2.5e-1}
POISON = 0xFF  # as floats, bfloat16 and scales: no number


pytestmark = needs_libraries


@dataclass
class Sequence:
    """One sequence with its keys and values: (length, kv_heads, head_dim), stored in a poisoned cache."""

    cache: Cache
    table: list[int]
    key: torch.Tensor
    value: torch.Tensor

    @property
    def length(self) -> int:
        return self.key.shape[0]


def sequence(
    library: Library,
    length: int,
    *,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: str = "float32",
    block_size: int = 32,
    seed: int = 0,
) -> Sequence:
    """Random keys and values in blocks that lie scattered, in layer 1 of 2."""
    if dtype == "bfloat16_pairs" and not library.pair_products:
        pytest.skip("this library does not multiply pairs here")
    generator = torch.Generator().manual_seed(seed)
    used = -(-length // block_size)
    shape = CacheShape(2, used + 3, kv_heads, block_size, head_dim, dtype)
    cache = Cache(library, shape, fill=POISON)
    table = torch.randperm(used + 3, generator=generator)[:used].tolist()
    key, value = torch.randn(2, length, kv_heads, head_dim, generator=generator)
    ops.store(cache, 1, ops.Rows(table=table, start=0, count=length), key, value)
    return Sequence(cache, table, key, value)


def queries(seq: Sequence, group: int, *, seed: int = 1, window: int = 0) -> ops.Queries:
    shape = (seq.length, seq.key.shape[1] * group, seq.key.shape[2])
    q = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ops.Queries(q=q, scale=1 / math.sqrt(shape[2]), layer=1, window=window)


def visible(length: int, window: int, sinks: int) -> torch.Tensor:
    """(rows, keys): row i sees the keys up to i, or the last `window` of them and the sinks."""
    row, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    near = key > row - window if window else torch.ones_like(key <= row)
    return (key <= row) & (near | (key < sinks))


def expected(seq: Sequence, q: ops.Queries, sinks: int = 0) -> torch.Tensor:
    """torch's attention in float64: (length, heads, head_dim)."""
    group = q.q.shape[1] // seq.key.shape[1]
    spread = [x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (seq.key, seq.value)]
    mask = visible(seq.length, q.window, sinks)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.q.double().transpose(0, 1), *spread, attn_mask=mask, scale=q.scale
    )
    return out.transpose(0, 1)


def assert_near(out: torch.Tensor, wanted: torch.Tensor, dtype: str) -> None:
    error = (out.double() - wanted).abs().max().item()
    assert error <= TOLERANCE[dtype] * wanted.abs().max().item()


def everything(seq: Sequence, sinks: int = 0) -> ops.Rows:
    return ops.Rows(table=seq.table, start=0, count=seq.length, sinks=sinks)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("length", "group", "head_dim"), [(1, 1, 64), (77, 3, 64), (130, 2, 96), (600, 7, 32)])
def test_prefill_is_attention(library: Library, dtype: str, length: int, group: int, head_dim: int) -> None:
    seq = sequence(library, length, head_dim=head_dim, dtype=dtype)
    q = queries(seq, group)
    assert_near(ops.attention(seq.cache, everything(seq), q), expected(seq, q), dtype)


@given(
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(sorted(TOLERANCE)),
    length=st.integers(1, 200),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([8, 16, 24, 32, 64, 80, 128, 256]),
    block_size=st.sampled_from([16, 32, 48, 128]),
    window=st.one_of(st.just(0), st.integers(1, 250)),
    sinks=st.one_of(st.just(0), st.integers(1, 90)),
    tile_rows=st.integers(1, 32),
)
@settings(max_examples=80, deadline=None)
def test_any_shape_is_attention(
    isa: str,
    dtype: str,
    length: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    window: int,
    sinks: int,
    tile_rows: int,
) -> None:
    library = open_library(isa)
    assume(dtype != "bfloat16_pairs" or library.pair_products)
    seq = sequence(
        library, length, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, block_size=block_size, seed=length
    )
    q = queries(seq, group, window=window)
    out = ops.attention(seq.cache, everything(seq, sinks), q, tile_rows=tile_rows)
    assert_near(out, expected(seq, q, sinks), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (100, 0), (70, 5), (300, 130)])
def test_a_row_has_the_same_bits_however_it_is_computed(library: Library, dtype: str, window: int, sinks: int) -> None:
    """A whole prompt, its rows alone, other cuts, and segments apart."""
    seq = sequence(library, 1100, dtype=dtype, kv_heads=1)
    q = queries(seq, 3, window=window)
    whole = ops.attention(seq.cache, everything(seq, sinks), q)
    assert torch.equal(ops.attention(seq.cache, everything(seq, sinks), q, split=True), whole)
    assert torch.equal(ops.attention(seq.cache, everything(seq, sinks), q, tile_rows=5), whole)
    chunks = torch.empty_like(whole)
    for start, end in [(0, 1), (1, 130), (130, 1093), *((i, i + 1) for i in range(1093, 1100))]:
        rows = ops.Rows(table=seq.table, row=start, start=start, count=end - start, sinks=sinks)
        ops.attention(seq.cache, rows, q, out=chunks)
    assert torch.equal(chunks, whole)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_token_that_is_no_number_reaches_only_those_who_see_it(library: Library, dtype: str) -> None:
    seq = sequence(library, 90, dtype=dtype)
    q = queries(seq, 2)
    before = ops.attention(seq.cache, everything(seq), q)
    for bad in (math.nan, math.inf):
        key, value = seq.key.clone(), seq.value.clone()
        key[70, 0, 3] = value[70, 1, 5] = bad
        ops.store(seq.cache, 1, everything(seq), key, value)
        after = ops.attention(seq.cache, everything(seq), q)
        assert torch.equal(after[:70], before[:70])
        assert after[70:, :2].isnan().all()
        assert not after[70:, 2:].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [1, 17, 62])
def test_rows_within_the_sinks_read_nothing_behind_them(library: Library, dtype: str, length: int) -> None:
    seq = sequence(library, length, dtype=dtype, block_size=64)
    q = queries(seq, 2)
    assert_near(ops.attention(seq.cache, everything(seq, sinks=70), q), expected(seq, q, sinks=70), dtype)


def test_pairs_are_refused_where_they_cannot_be_multiplied() -> None:
    with pytest.raises(ValueError, match="generic code does not multiply pairs of bfloat16"):
        Cache(open_library("generic"), CacheShape(1, 1, 1, 16, 64, "bfloat16_pairs"))


def test_tokens_of_a_batch_do_not_see_other_sequences(library: Library) -> None:
    seq = sequence(library, 40)
    q = queries(seq, 3)
    alone = ops.attention(seq.cache, everything(seq), q)
    shifted = ops.Queries(q=torch.cat((torch.full_like(q.q[:7], math.nan), q.q)), scale=q.scale, layer=1)
    out = torch.full_like(shifted.q, 5.0)
    ops.attention(seq.cache, ops.Rows(table=seq.table, row=7, start=0, count=40), shifted, out=out)
    assert torch.equal(out[7:], alone)
    assert (out[:7] == 5).all()


@pytest.mark.parametrize("sinks", [4, 16, 70])
def test_sinks_are_seen_from_the_rebased_position(library: Library, sinks: int) -> None:
    """StreamingLLM's positions: with 1000 gone behind the sinks, these are as near as if the others never were."""
    gone, length, head_dim = 1000, 150, 64
    seq = sequence(library, length, head_dim=head_dim, kv_heads=1)
    raw = queries(seq, 2)
    frequencies = rope_frequencies(head_dim, 10_000.0)
    index = torch.arange(length)
    position = torch.where(index < sinks, index, index + gone)
    key = seq.key.clone()
    ops.store(seq.cache, 1, everything(seq), reference_rope(key, position, frequencies), seq.value)
    q = ops.Queries(
        q=reference_rope(raw.q, index + gone, frequencies),
        q_rebased=reference_rope(raw.q, index, frequencies),
        scale=raw.scale,
        layer=1,
    )
    out = ops.attention(seq.cache, everything(seq, sinks), q)
    near = Sequence(seq.cache, seq.table, reference_rope(key, index, frequencies), seq.value)
    same = ops.Queries(q=reference_rope(raw.q, index, frequencies), scale=raw.scale, layer=1)
    torch.testing.assert_close(out[sinks:], expected(near, same)[sinks:].float(), rtol=2e-4, atol=2e-4)


def test_channel_factors_of_keys_change_no_product_and_save_outlier_channels(library: Library) -> None:
    """Keys with a channel 50 times as large as the others lose them in 4 bits, unless it is divided away first."""
    generator = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, 64, 1, 64, generator=generator)
    key[:, :, 7] *= 50
    factor = torch.ones(1, 1, 64)
    factor[..., 7] = 50
    q = torch.randn(64, 1, 64, generator=generator)
    q[:, :, 7] /= 50
    errors = []
    for key_scale in (None, factor.numpy()):
        cache = Cache(library, CacheShape(1, 2, 1, 32, 64, "int4"), key_scale, fill=POISON)
        rows = ops.Rows(table=[1, 0], start=0, count=64)
        ops.store(cache, 0, rows, key, value)
        request = ops.Queries(q=q, scale=0.125)
        wanted = expected(Sequence(cache, [1, 0], key, value), request)
        errors.append((ops.attention(cache, rows, request).double() - wanted).abs().mean().item())
    assert errors[1] < errors[0] / 2
