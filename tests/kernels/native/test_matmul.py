"""Native products against float64, over every format and instruction set that this machine has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.native.library import Pool, open_library
from meshlm.kernels.native.matmul import (
    multiply,
    quantize_activations,
    read_row,
    reference_multiply,
    reference_quantize_activations,
)
from meshlm.kernels.native.matrix import pack
from meshlm.kernels.native.memory import ALIGNMENT, Arena
from meshlm.kernels.native.packed import Format, PackedMatrix
from meshlm.kernels.quantize import GROUP, GroupQuantized, dequantize
from tests.kernels.native.libraries import ISAS, needs_libraries

EPSILON = 2.0**-24  # a float32 operation's largest relative error
FORMATS = tuple(Format)
QUANTIZED = (Format.Q8, Format.Q4, Format.Q4M)

Weight = torch.Tensor | GroupQuantized


pytestmark = needs_libraries


@pytest.fixture(scope="module", params=ISAS)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with Pool(open_library(request.param), threads=2) as pool:
        yield pool


class PoisonedArena(Arena):
    """Memory full of 0xFF, NaN in every float format, within what it gives and behind it."""

    def allocate(self, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
        piece = super().allocate(nbytes + 4096)
        ctypes.memset(piece, 0xFF, nbytes + 4096)
        return piece


def make_weight(form: Format, rows: int, cols: int, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    if form in (Format.F32, Format.BF16):
        dense = torch.randn(rows, cols, generator=generator)
        return dense if form is Format.F32 else dense.bfloat16()
    bits = 8 if form is Format.Q8 else 4
    codes = torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8, generator=generator)
    scales = (0.001 + torch.rand(rows, cols // GROUP, generator=generator) / 50).half()
    minimums = None
    if form is Format.Q4M:
        minimums = (-torch.rand(rows, cols // GROUP, generator=generator) / 5).half()
    return GroupQuantized(bits, codes, scales, minimums)


def make_input(tokens: int, cols: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed))


def packed(weight: Weight, pool: Pool) -> PackedMatrix:
    return pack(weight, library=pool.library, arena=PoisonedArena())


def allowed(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The most that float32 sums of such terms may be off: operations in a row * epsilon * the terms' magnitudes."""
    if isinstance(weight, torch.Tensor):
        return (weight.shape[1] + 2) * EPSILON * (x.double().abs() @ weight.double().abs().T)
    offset = 0 if weight.minimums is not None else 2 ** (weight.bits - 1)
    minimums = weight.scales.double() * offset if weight.minimums is None else weight.minimums.double().abs()
    scales, lows = (part.repeat_interleave(GROUP, 1) for part in (weight.scales.double(), minimums))
    magnitudes = scales * weight.codes.double() + lows
    groups = weight.codes.shape[1] // GROUP
    return (2 * groups + 8) * EPSILON * (reference_quantize_activations(x).abs() @ magnitudes.T)


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: Weight) -> None:
    error = (y.double() - reference_multiply(x, weight)).abs()
    assert y.shape == error.shape
    assert bool((error <= allowed(x, weight) + 1e-30).all()), float(error.max())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("rows", "cols", "tokens"),
    [(1, 32, 1), (17, 96, 2), (8, 96, 9), (33, 576, 3), (20, 1536, 40), (100, 1536, 1), (15, 2080, 17)],
)
def test_a_product_is_the_dequantized_one(pool: Pool, form: Format, rows: int, cols: int, tokens: int) -> None:
    weight, x = make_weight(form, rows, cols), make_input(tokens, cols)
    assert_product(multiply(x, packed(weight, pool), pool), x, weight)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_no_shape_reads_or_leaves_what_is_not_the_matrix(data: st.DataObject, pool: Pool) -> None:
    form = data.draw(st.sampled_from(FORMATS))
    rows, tokens = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 40))
    cols = data.draw(st.integers(1, 20)) * GROUP if form in QUANTIZED else data.draw(st.integers(1, 200))
    weight, x = make_weight(form, rows, cols), make_input(tokens, cols)
    assert_product(multiply(x, packed(weight, pool), pool), x, weight)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_token_has_the_same_bits_alone_and_among_others(pool: Pool, form: Format) -> None:
    matrix = packed(make_weight(form, 50, 2112), pool)
    x = make_input(23, 2112)
    alone = torch.cat([multiply(x[t : t + 1], matrix, pool) for t in range(len(x))])
    for tokens in (*range(1, 18), 23):  # every width of a tile, and their mixtures
        assert torch.equal(multiply(x[:tokens], matrix, pool), alone[:tokens]), tokens


@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.name)
def test_the_number_of_threads_changes_no_bit(pool: Pool, form: Format) -> None:
    matrix, x = packed(make_weight(form, 200, 320), pool), make_input(5, 320)
    with Pool(pool.library, threads=1) as one, Pool(pool.library, threads=5) as five:
        assert torch.equal(multiply(x, matrix, one), multiply(x, matrix, five))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_an_expert_multiplies_the_tokens_that_its_index_names(pool: Pool, form: Format) -> None:
    x = make_input(20, 96)
    every = torch.arange(20)
    choice = torch.randint(0, 8, (20,), generator=torch.Generator().manual_seed(3))
    for expert in range(8):
        matrix = packed(make_weight(form, 24, 96, seed=expert), pool)
        index = every[choice == expert].to(torch.int32)
        assert torch.equal(multiply(x, matrix, pool, index), multiply(x, matrix, pool)[index.long()])
    backwards = torch.tensor([19, 3, 3, 0], dtype=torch.int32)
    assert torch.equal(multiply(x, matrix, pool, backwards), multiply(x, matrix, pool)[backwards.long()])


@pytest.mark.parametrize("form", QUANTIZED, ids=lambda form: form.name)
@pytest.mark.parametrize("code", ["lowest", "highest", "both"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_codes_and_activations_do_not_saturate(pool: Pool, form: Format, code: str, sign: float) -> None:
    weight = make_weight(form, 16, 128)
    assert isinstance(weight, GroupQuantized)
    highest = 2**weight.bits - 1
    weight.codes[:] = {"lowest": 0, "highest": highest, "both": 0}[code]
    if code == "both":
        weight.codes[:, ::2] = highest
    x = torch.full((3, 128), sign)  # every code is 127 or -127
    x[1, 1::2] = -sign
    x[2, 2::4] = -sign
    assert_product(multiply(x, packed(weight, pool), pool), x, weight)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_row_is_read_back_as_it_was_packed(pool: Pool, form: Format) -> None:
    weight = make_weight(form, 37, 96)
    expected = dequantize(weight) if isinstance(weight, GroupQuantized) else weight.float()
    matrix = packed(weight, pool)
    for row in range(37):
        assert torch.equal(read_row(matrix, row, library=pool.library), expected[row])


def test_activations_are_rounded_to_nearest_even_within_their_group(pool: Pool) -> None:
    x = make_input(9, 192) * torch.logspace(-6, 6, 9).unsqueeze(1)
    x[2, 32:64] = 0.0
    x[3, :32] = torch.arange(32) + 0.5  # ties, once the scale is 1
    x[3, 31] = 127.0
    codes, scales, sums = quantize_activations(x, library=pool.library)
    grouped = x.view(9, 6, GROUP)
    wanted_scales = grouped.abs().amax(-1) / 127
    wanted = torch.where(wanted_scales.unsqueeze(-1) > 0, torch.round(grouped / wanted_scales.unsqueeze(-1)), 0.0)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(codes.float(), wanted.view(9, 192))
    assert torch.equal(sums, wanted_scales * wanted.sum(-1))


def test_a_group_too_small_for_a_scale_counts_as_zeros(pool: Pool) -> None:
    codes, scales, sums = quantize_activations(torch.full((1, 32), 1e-40), library=pool.library)
    assert not codes.any()
    assert not scales.any()
    assert not sums.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_no_number_harms_no_other(pool: Pool, bad: float) -> None:
    matrix, x = packed(make_weight(Format.Q4M, 40, 96), pool), make_input(7, 96)
    before = multiply(x, matrix, pool)
    x[3, 5:70] = bad
    after = multiply(x, matrix, pool)
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(after[others], before[others])
    assert not torch.isfinite(after[3]).any()


def test_a_matrix_may_be_a_view_of_another(pool: Pool) -> None:
    weight = make_weight(Format.Q4M, 40, 96)
    assert isinstance(weight, GroupQuantized)
    x = make_input(3, 96)
    assert torch.equal(
        multiply(x, packed(weight.rows(7, 30), pool), pool), multiply(x, packed(weight, pool), pool)[:, 7:30]
    )
    dense = torch.randn(96, 40).T
    assert_product(multiply(x, packed(dense, pool), pool), x, dense)


def test_pieces_of_an_arena_are_aligned_and_apart() -> None:
    arena = Arena(chunk_bytes=1 << 16)
    pieces = [arena.allocate(size) for size in (1, 63, 64, 65, 5_000_000, 1, 70_000)]
    starts = [ctypes.addressof(piece) for piece in pieces]
    assert all(start % ALIGNMENT == 0 for start in starts)
    for number, piece in enumerate(pieces):
        ctypes.memset(piece, number + 1, len(piece))
    assert all(set(bytes(piece)) == {number + 1} for number, piece in enumerate(pieces))


def test_a_matrix_tells_the_bytes_it_takes() -> None:
    assert pack(make_weight(Format.Q4, 16, 64)).nbytes == 16 * 64 * 4.5 / 8
    assert pack(make_weight(Format.Q4M, 16, 64)).nbytes == 16 * 64 * 5 / 8
    assert pack(make_weight(Format.Q8, 17, 64)).nbytes == 32 * 64 * 8.5 / 8  # padded to whole blocks
    assert pack(make_weight(Format.BF16, 16, 5)).nbytes == 160


def codes(rows: int = 2, cols: int = 64) -> torch.Tensor:
    return torch.zeros(rows, cols, dtype=torch.uint8)


def halves(rows: int = 2, groups: int = 2) -> torch.Tensor:
    return torch.ones(rows, groups, dtype=torch.float16)


@pytest.mark.parametrize(
    ("weight", "named"),
    [
        (torch.zeros(2, 64, dtype=torch.float16), "weight must be float32 or bfloat16"),
        (torch.zeros(64), r"weight must be \(rows, cols\)"),
        (torch.zeros(0, 64), r"weight must be \(rows, cols\)"),
        (torch.zeros(2, 64, device="meta"), "weight must be on the CPU"),
        (GroupQuantized(4, codes().int(), halves()), "weight.codes must be torch.uint8"),
        (GroupQuantized(4, codes(cols=48), halves()), "weight.codes must have a multiple of 32 columns"),
        (GroupQuantized(4, codes() + 16, halves()), "weight.codes must be below 16"),
        (GroupQuantized(4, codes(), halves().float()), "weight.scales must be torch.float16"),
        (GroupQuantized(4, codes(), halves(groups=1)), r"weight.scales must be \(2, 2\)"),
        (GroupQuantized(4, codes(), halves(), halves(groups=1)), r"weight.minimums must be \(2, 2\)"),
        (GroupQuantized(8, codes(), halves(), halves()), "weight.minimums must be None"),
        (GroupQuantized(5, codes(), halves()), "weight.bits must be 4 or 8"),
    ],
)
def test_a_weight_that_cannot_be_packed_is_refused_by_name(weight: Weight, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        pack(weight)


@pytest.mark.parametrize(
    ("x", "index", "named"),
    [
        (torch.zeros(2, 32), None, "x must have 64 columns"),
        (torch.zeros(64), None, r"x must be \(tokens, cols\) float32"),
        (torch.zeros(2, 64, dtype=torch.float64), None, r"x must be \(tokens, cols\) float32"),
        (torch.zeros(2, 64), torch.tensor([0, 1]), "index must be .* int32"),
        (torch.zeros(2, 64), torch.tensor([2], dtype=torch.int32), r"index must name tokens in \[0, 2\)"),
        (torch.zeros(2, 64), torch.tensor([-1], dtype=torch.int32), r"index must name tokens in \[0, 2\)"),
    ],
)
def test_input_that_does_not_fit_is_refused_by_name(
    pool: Pool, x: torch.Tensor, index: torch.Tensor | None, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        multiply(x, packed(make_weight(Format.Q4, 3, 64), pool), pool, index)


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there_is_refused(row: int) -> None:
    with pytest.raises(ValueError, match=r"row must be in \[0, 3\)"):
        read_row(pack(make_weight(Format.F32, 3, 5)), row)
