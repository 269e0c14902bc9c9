"""Native draws against the torch sampler and against definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.native import ops
from meshlm.kernels.native.library import Library, open_library
from meshlm.kernels.native.structures import Draw
from meshlm.kernels.sample import NO_TOKEN
from meshlm.worker.engine.sampler import filter_logits
from meshlm.worker.messages import Sampling
from tests.kernels.native.libraries import ISAS, needs_libraries

pytestmark = needs_libraries
NEAR = 1e-6  # of the whole probability: rounding


@dataclass
class Case:
    logits: torch.Tensor  # (vocab,)
    sampling: Sampling
    uniform: float

    def draw(self) -> Draw:
        s = self.sampling
        return Draw(s.temperature, s.top_p, s.min_p, s.top_k, self.uniform)


def random_case(generator: torch.Generator, vocab: int) -> Case:
    def pick(*options: float) -> float:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    shape = int(torch.randint(4, (1,), generator=generator))
    logits = torch.randn(vocab, generator=generator) * pick(0.1, 2, 6)
    if shape == 1:
        logits = logits.round()  # many equals
    elif shape == 2:
        logits[torch.randint(vocab, (5,), generator=generator)] += 20
    elif shape == 3:
        logits[torch.rand(vocab, generator=generator) < 0.5] = -math.inf
        logits[0] = 1.0
    sampling = Sampling(
        temperature=pick(0.05, 0.7, 1.0, 1.9),
        top_p=pick(1.0, 1.0, 0.95, 0.6, 0.01, 0.999),
        top_k=int(pick(0, 0, 1, 5, 50, 700, 10**6)),
        min_p=pick(0.0, 0.0, 0.05, 0.5, 1.0),
    )
    return Case(logits, sampling, float(torch.rand(1, generator=generator, dtype=torch.float64)))


def filtered(case: Case) -> torch.Tensor:
    """Probabilities as the torch sampler draws from them, float64: (vocab,)."""
    row = (case.logits / torch.tensor(case.sampling.temperature)).unsqueeze(0)
    filter_logits(row, [case.sampling])
    return torch.softmax(row, -1)[0].double()


def assert_same_draw(case: Case, token: int) -> None:
    """`token` is what inverse distribution gives, or a neighbour across a boundary that rounding moves."""
    p = filtered(case)
    cumulative = p.cumsum(0) / p.sum()
    wanted = int(torch.searchsorted(cumulative, torch.tensor(case.uniform, dtype=torch.float64), right=True))
    if token == wanted:
        return
    # Only a uniform number right at the border of two tokens may fall to either.
    edge = cumulative[min(token, wanted)].item()
    assert abs(edge - case.uniform) < NEAR, (case.sampling, token, wanted)


def test_thousands_of_rows_draw_what_torch_draws(library: Library) -> None:
    generator = torch.Generator().manual_seed(11)
    for vocab in (1, 7, 33, 500, 3001):
        cases = [random_case(generator, vocab) for _ in range(300)]
        logits = torch.stack([case.logits for case in cases])
        for case, token in zip(cases, ops.sample(library, logits, [case.draw() for case in cases]), strict=True):
            assert_same_draw(case, token)


def test_a_whole_vocabulary_draws_what_torch_draws(library: Library) -> None:
    generator = torch.Generator().manual_seed(12)
    cases = [random_case(generator, 49_152) for _ in range(20)]
    logits = torch.stack([case.logits for case in cases])
    for case, token in zip(cases, ops.sample(library, logits, [case.draw() for case in cases]), strict=True):
        assert_same_draw(case, token)


@given(
    isa=st.sampled_from(ISAS),
    values=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(-(2.0**125), 2.0**125, width=32)), min_size=1, max_size=70
    ),
    top_k=st.integers(0, 80),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=150)
def test_any_finite_logits_draw_what_torch_draws(
    isa: str, values: list[float], top_k: int, min_p: float, uniform: float
) -> None:
    case = Case(torch.tensor(values), Sampling(top_k=top_k, min_p=min_p), uniform)
    assert_same_draw(case, ops.sample(open_library(isa), case.logits.unsqueeze(0).clone(), [case.draw()])[0])


def test_equals_at_a_threshold_stay_in(library: Library) -> None:
    """Of four equal tokens top-k 2 and top-p 0.3 keep all four, and so each quarter of the unit draws its own."""
    logits = torch.full((40,), -5.0)
    logits[[3, 9, 20, 31]] = 2.0
    for k, p in [(2, 1.0), (0, 0.3), (3, 0.6)]:
        draws = [Draw(1.0, p, 0.0, k, u) for u in (0.1, 0.4, 0.6, 0.9)]
        assert ops.sample(library, logits.repeat(4, 1), draws) == [3, 9, 20, 31]


def test_thousands_of_equals_end_the_search(library: Library) -> None:
    """Bisection meets a value that more tokens share than it would sort."""
    logits = torch.zeros(5000)
    logits[17] = 1.0
    draws = [Draw(1.0, 1.0, 0.0, 2, 0.999999), Draw(1.0, 0.5, 0.0, 0, 0.999999), Draw(1.0, 1.0, 0.0, 1, 0.999999)]
    assert ops.sample(library, logits.repeat(3, 1), draws) == [4999, 4999, 17]


def test_greedy_takes_the_lowest_of_equals(library: Library) -> None:
    greedy = Draw(0.0, 1.0, 0.0, 0, 0.5)
    for vocab in (1, 5, 16, 47, 1000):
        logits = torch.zeros(vocab)
        logits[vocab // 2 :] = 3.0
        assert ops.sample(library, logits.unsqueeze(0), [greedy]) == [vocab // 2]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nothing_is_drawn_of_a_row_that_is_no_distribution(library: Library, temperature: float) -> None:
    """One logit that is no number, wherever it lies in a vector's lanes or behind the last; all; or nothing at all."""
    draw = Draw(temperature, 0.9, 0.0, 5, 0.5)
    for vocab in (1, 5, 16, 47, 1000):
        for at in {0, vocab // 2, vocab - 1}:
            logits = torch.zeros(2, vocab)
            logits[0, at] = math.nan
            drawn = ops.sample(library, logits, [draw, Draw(0.0, 1.0, 0.0, 0, 0.5)])
            assert drawn == [NO_TOKEN, 0]  # the row beside it is drawn of
    for nothing in (math.nan, -math.inf):
        assert ops.sample(library, torch.full((1, 20), nothing), [draw]) == [NO_TOKEN]


def test_scores_of_a_row_with_what_is_no_number_are_none(library: Library) -> None:
    for at in (0, 37):
        logits = torch.randn(40)
        logits[at] = math.nan
        assert math.isnan(ops.log_sum_exp(library, logits))


def test_what_cannot_be_drawn_is_not_drawn(library: Library) -> None:
    """Masked tokens, and overflow past the greatest float; for u at both ends."""
    logits = torch.full((100,), -math.inf)
    logits[41] = 1.0
    for u in (0.0, 0.5, 1 - 2**-53):
        for k, p, m in [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.2)]:
            assert ops.sample(library, logits.unsqueeze(0).clone(), [Draw(1.0, p, m, k, u)]) == [41]
    huge = torch.tensor([[1.0, 3e38, 3e38, 0.0]])
    assert ops.sample(library, huge.clone(), [Draw(1e-6, 1.0, 0.0, 0, 0.2)]) == [1]
    assert ops.sample(library, huge.clone(), [Draw(1e-6, 1.0, 0.0, 0, 0.7)]) == [2]


@pytest.mark.parametrize("vocab", [1, 19, 1000, 49_152])
def test_scores_are_log_probability_and_entropy(library: Library, vocab: int) -> None:
    logits = torch.randn(5, vocab) * torch.tensor([[0.1], [1], [5], [30], [3]])
    logits[4, ::3] = -math.inf
    logits[4, vocab // 2] = 40.0
    targets = [vocab // 2, 0, vocab - 1, vocab // 3, vocab // 2]
    logprobs, entropies = ops.score(library, logits, targets)
    wanted = torch.log_softmax(logits.double(), -1)
    assert logprobs == pytest.approx(wanted[range(5), targets].tolist(), rel=1e-5, abs=1e-6)
    assert entropies == pytest.approx(
        (-(wanted.exp() * wanted.nan_to_num(0, 0, 0)).sum(-1)).tolist(), rel=1e-5, abs=2e-6
    )
    for row in range(5):
        wanted_sum = logits[row].double().logsumexp(0).item()
        assert ops.log_sum_exp(library, logits[row].clone()) == pytest.approx(wanted_sum, rel=1e-6, abs=1e-6)


@given(isa=st.sampled_from(ISAS), vocab=st.integers(1, 300), count=st.integers(1, 20), equals=st.booleans())
@settings(deadline=None)
def test_the_top_are_the_greatest_and_of_equals_the_lowest(isa: str, vocab: int, count: int, equals: bool) -> None:
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab * 21 + count))
    if equals:
        row = row.round()
    ids, values = ops.top(open_library(isa), row, count)
    order = sorted(range(vocab), key=lambda i: (-row[i].item(), i))[:count]
    assert ids == order + [-1] * (count - len(order))
    assert values[: len(order)] == [row[i].item() for i in order]
