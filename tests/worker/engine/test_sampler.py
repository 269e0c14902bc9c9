"""The sampler against transformers' processors, a computed distribution, and its own promise about randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meshlm.worker.engine.draws import uniform
from meshlm.worker.engine.sampler import Sampler, filter_logits
from meshlm.worker.engine.sequence import Sequence
from meshlm.worker.messages import Limits, Sampling, Submit

VOCAB = 50


def sequence(prompt: list[int], output: list[int], limits: Limits | None = None, **sampling: Any) -> Sequence:
    request = Submit(id="s", prompt=prompt, sampling=Sampling(**sampling), limits=limits or Limits(max_tokens=100))
    return Sequence(request, [*prompt, *output])


def logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(row: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    """How often each token is drawn over `count` output positions: (vocab,)."""
    prompt = [1]
    sequences = [sequence(prompt, [0] * index, seed=7, **sampling) for index in range(count)]
    tokens = [entry.token for entry in Sampler().sample(row.repeat(count, 1), sequences)]
    return torch.bincount(torch.tensor(tokens), minlength=len(row[0]))


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom, rare tokens pooled."""
    expected = probabilities.double() * counts.sum()
    common = expected >= 5
    observed = torch.cat((counts[common].double(), counts[~common].sum().double().reshape(1)))
    wanted = torch.cat((expected[common], expected[~common].sum().reshape(1)))
    kept = wanted > 0
    return float(((observed - wanted)[kept] ** 2 / wanted[kept]).sum()), int(kept.sum()) - 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_tokens_follow_the_distribution(sampling: dict[str, Any]) -> None:
    row = logits(seed=3)
    scaled = row[0].double() / sampling["temperature"]
    probabilities = torch.softmax(scaled, -1)
    kept = probabilities >= sampling.get("min_p", 0.0) * probabilities.max()
    order = (probabilities * kept).argsort(descending=True)
    order = order[: min(sampling.get("top_k") or VOCAB, int(kept.sum()))]
    shares = probabilities[order] / probabilities[order].sum()
    order = order[: int((shares.cumsum(0) - shares < sampling.get("top_p", 1.0)).sum())]
    wanted = torch.zeros(VOCAB, dtype=torch.float64)
    wanted[order] = probabilities[order] / probabilities[order].sum()
    counts = drawn(row, 4000, **sampling)
    assert int(counts[wanted == 0].sum()) == 0
    statistic, freedom = chi_square(counts, wanted)
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 8  # far out in the tail of chi-square


@pytest.mark.oracle
@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    transformers = pytest.importorskip("transformers")
    row, prompt, output = logits(seed=1), [3, 4, 3, 10], [11, 4, 11]
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), row.clone())
    Sampler().sample(row, [sequence(prompt, output, temperature=0.0, repetition_penalty=penalty)])
    torch.testing.assert_close(row, expected)


@pytest.mark.oracle
@pytest.mark.parametrize(("name", "value"), [("top_k", 5), ("top_p", 0.7), ("min_p", 0.1)])
def test_filters_keep_the_tokens_that_transformers_keeps(name: str, value: float) -> None:
    transformers = pytest.importorskip("transformers")
    warper = {"top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper"}[name]
    rows = logits(20, seed=5, vocab=600)
    expected = getattr(transformers, warper)(value)(None, rows.clone())
    filter_logits(rows, [Sampling(**{name: value})] * 20)
    assert torch.equal(rows.isneginf(), expected.isneginf())


def test_top_p_looks_beyond_its_first_candidates_where_the_distribution_is_flat() -> None:
    rows = torch.linspace(0, 0.01, 2000).unsqueeze(0)
    filter_logits(rows, [Sampling(top_p=0.9)])
    assert abs(int((~rows.isneginf()).sum()) - 1800) < 10


def test_presence_and_frequency_count_output_tokens_only() -> None:
    row = logits(seed=2)
    expected = row.clone()
    for token, times in ((7, 3), (9, 1)):  # token 5 stands in the prompt alone
        expected[0, token] -= 0.5 + 0.25 * times
    Sampler().sample(
        row, [sequence([5, 5, 7], [7, 9, 7, 7], temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25)]
    )
    torch.testing.assert_close(row, expected)


def test_counts_grow_with_the_sequence_and_are_rebuilt_after_forget() -> None:
    sampler, one = Sampler(), sequence([1], [2], temperature=0.0, frequency_penalty=1.0)
    sampler.sample(logits(), [one])
    one.tokens += [2, 3]
    grown, rebuilt = logits(), logits()
    sampler.sample(grown, [one])
    sampler.forget(one)
    sampler.sample(rebuilt, [one])
    assert torch.equal(grown, rebuilt)
    assert grown[0, 2] == logits()[0, 2] - 2


@pytest.mark.parametrize("sampling", [{"temperature": 1e-38}, {"temperature": 1.0, "repetition_penalty": 1e-38}])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_smallest_values_that_are_allowed_draw_the_likeliest_token(sampling: dict[str, Any], top_p: float) -> None:
    row = logits()
    best = int(row.argmax())  # a token id outside the vocabulary would end the engine at the next step
    [entry] = Sampler().sample(row, [sequence([best], [], top_p=top_p, **sampling)])
    assert entry.token == best


def test_a_step_that_is_tried_again_counts_no_token_twice() -> None:
    sampler, one = Sampler(), sequence([1], [2], temperature=0.0, frequency_penalty=1.0)
    once, twice = logits(), logits()
    sampler.sample(once, [one])
    sampler.sample(twice, [one])
    assert torch.equal(once, twice)


def test_bias_moves_a_token_up_and_bans_another() -> None:
    row = logits()
    best = int(row.argmax())
    [entry] = Sampler().sample(row, [sequence([1], [], temperature=0.0, logit_bias={best: -100.0, 13: 100.0})])
    assert entry.token == 13


def test_stop_tokens_are_not_drawn_before_the_minimum_length() -> None:
    best = int(logits().argmax())
    limits = Limits(max_tokens=9, min_tokens=2, stop_token_ids=frozenset({best}))
    tokens = [Sampler().sample(logits(), [sequence([1], [0] * n, limits, temperature=0.0)])[0].token for n in range(4)]
    assert best not in tokens[:2]
    assert tokens[2:] == [best, best]


def test_logprobs_are_the_models_own_before_any_change() -> None:
    row = logits()
    expected = torch.log_softmax(row[0], -1)
    sampling = {"temperature": 0.3, "top_k": 2, "logit_bias": {13: 100.0}, "repetition_penalty": 2.0, "logprobs": 3}
    [entry] = Sampler().sample(row, [sequence([1], [2], **sampling)])
    assert entry.token == 13
    assert entry.logprob == pytest.approx(float(expected[13]), abs=1e-5)
    assert [top.token for top in entry.top] == expected.topk(3).indices.tolist()
    assert [top.logprob for top in entry.top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-5)


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    rows = logits(16, vocab=3000)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 40, "presence_penalty": 1.0},
    ]
    sequences = [sequence([1], [2] * row, seed=row, **kinds[row % 4]) for row in range(16)]
    together = [entry.token for entry in Sampler().sample(rows.clone(), sequences)]
    alone = [Sampler().sample(rows[row : row + 1].clone(), [sequences[row]])[0].token for row in range(16)]
    assert together == alone


def test_numbers_are_uniform_and_differ_by_seed_and_index() -> None:
    numbers = torch.tensor([uniform(seed, index) for seed in range(100) for index in range(100)], dtype=torch.float64)
    assert len(numbers.unique()) == 10_000
    counts = torch.histc(numbers, 20, 0.0, 1.0)
    assert float(((counts - 500) ** 2 / 500).sum()) < 45  # 19 degrees of freedom: p is about 0.001
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
