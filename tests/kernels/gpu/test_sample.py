"""Draws on the device against the definition, the engine's own sampler, and the distribution."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.gpu import sample as module
from meshlm.kernels.gpu.checks import ArgumentError
from meshlm.kernels.gpu.sample import count_tokens, sample
from meshlm.kernels.sample import (
    NO_TOKEN,
    SampleRows,
    reference_count_tokens,
    reference_probabilities,
    reference_sample,
)

NEAR = 2e-6  # of the whole probability: float32 sums in another order


def rows_of(cases: list[dict[str, float]], device: torch.device) -> SampleRows:
    """Of dictionaries with what is not neutral."""

    def column(name: str, neutral: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([case.get(name, neutral) for case in cases], dtype=dtype, device=device)

    return SampleRows(
        temperature=column("temperature", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        uniform=column("uniform", 0.5, torch.float64),
        repetition=column("repetition", 1.0, torch.float32),
        presence=column("presence", 0.0, torch.float32),
        frequency=column("frequency", 0.0, torch.float32),
        slots=column("slot", -1, torch.int32),
    )


def row_of(rows: SampleRows, row: int) -> SampleRows:
    columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return SampleRows(**{name: None if c is None else c[row : row + 1] for name, c in columns.items()})


def random_logits(generator: torch.Generator, vocab: int, spread: float) -> torch.Tensor:
    """Plain, with many equals, with a few far above, or half masked: (vocab,)."""
    shape = int(torch.randint(4, (1,), generator=generator))
    logits = torch.randn(vocab, generator=generator) * spread
    if shape == 1:
        logits = logits.round()
    elif shape == 2:
        logits[torch.randint(vocab, (5,), generator=generator)] += 20
    elif shape == 3:
        logits[torch.rand(vocab, generator=generator) < 0.5] = -math.inf
        logits[0] = 1.0
    return logits


def random_case(generator: torch.Generator) -> dict[str, float]:
    def pick(*options: float) -> float:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    return {
        "temperature": pick(0.0, 0.05, 0.7, 1.0, 1.9),
        "top_p": pick(1.0, 1.0, 0.95, 0.6, 0.01, 0.999),
        "top_k": int(pick(0, 0, 1, 5, 50, 700, 10**6)),
        "min_p": pick(0.0, 0.0, 0.05, 0.5, 1.0),
        "uniform": float(torch.rand(1, generator=generator, dtype=torch.float64)),
    }


def assert_drawn(
    tokens: torch.Tensor, logits: torch.Tensor, rows: SampleRows, counts: torch.Tensor | None = None
) -> None:
    """The tokens are what inverse distribution gives, or a neighbour across a border that rounding moves."""
    cumulative = reference_probabilities(logits, rows, counts).cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    wanted = torch.searchsorted(cumulative, rows.uniform.cpu().unsqueeze(1), right=True).squeeze(1)
    for row, (token, right) in enumerate(zip(tokens.tolist(), wanted.tolist(), strict=True)):
        assert 0 <= token < logits.shape[1]
        if token != right:
            edge = cumulative[row, min(token, right)].item()
            assert abs(edge - rows.uniform[row].item()) < NEAR, (row_of(rows, row), token, right)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are held in registers, so that bisection over memory comes to its turn on small vocabularies."""
    monkeypatch.setattr(module, "default_config", lambda pieces, major: {"GROUP": 2, "CANDIDATES": 16, "num_warps": 4})


@pytest.mark.parametrize(("vocab", "count"), [(1, 4), (33, 20), (500, 20), (3001, 20), (9000, 5)])
def test_rows_of_mixed_settings_draw_what_the_definition_draws(vocab: int, count: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab)
    count *= 10 if device.type == "cuda" else 1
    logits = torch.stack([random_logits(generator, vocab, 0.1 + 6 * (i % 3) / 2) for i in range(count)]).to(device)
    rows = rows_of([random_case(generator) for _ in range(count)], device)
    tokens, _ = sample(logits, rows)
    assert_drawn(tokens, logits, rows)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("vocab", [300, 1300])
def test_more_candidates_than_are_held_at_once(vocab: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.stack([random_logits(generator, vocab, 1.0) for _ in range(4)]).to(device)
    cases = [{"top_k": 200}, {"top_k": 150, "top_p": 0.9}, {"top_p": 0.97}, {"top_p": 0.8, "min_p": 0.01}]
    rows = rows_of([{**case, "uniform": (i + 0.4) / 4} for i, case in enumerate(cases)], device)
    tokens, _ = sample(logits, rows)
    assert_drawn(tokens, logits, rows)


@given(
    values=st.lists(
        st.one_of(st.integers(-3, 3).map(float), st.floats(-(2.0**125), 2.0**125, width=32)), min_size=1, max_size=70
    ),
    top_k=st.integers(0, 80),
    top_p=st.sampled_from([1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_any_finite_logits_draw_what_the_definition_draws(
    values: list[float], top_k: int, top_p: float, min_p: float, uniform: float
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits = torch.tensor([values], device=device)
    rows = rows_of([{"top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}], device)
    assert_drawn(sample(logits, rows)[0], logits, rows)


def test_every_type_of_logits_is_read_and_no_type_is_written(dtypes: tuple[torch.dtype, ...]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(3)
    for dtype in {*dtypes, torch.bfloat16}:
        wide = (torch.randn(4, 900, generator=generator) * 3).to(device, dtype)
        logits = wide[:, 100:801]  # rows apart in memory
        rows = rows_of([{"uniform": 0.1 + 0.2 * i, "temperature": float(i)} for i in range(4)], device)
        before = wide.clone()
        tokens, logprobs = sample(logits, rows)
        assert_drawn(tokens, logits, rows)
        assert torch.equal(wide, before)
        wanted = torch.log_softmax(logits.double(), -1).gather(1, tokens.long().unsqueeze(1)).squeeze(1)
        assert torch.allclose(logprobs.double(), wanted, atol=2e-5)


def test_bias_penalties_and_forbidden_tokens(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(5)
    vocab, count = 2300, 8
    logits = (torch.randn(count, vocab, generator=generator) * 3).to(device)
    counts = torch.zeros(3, vocab, dtype=torch.int32, device=device)
    for slot in range(3):
        count_tokens(counts, *_said(slot, logits[slot].topk(40).indices[::2]), prompt=True)
        count_tokens(counts, *_said(slot, logits[slot].topk(60).indices.repeat(2)[30:]))
    cases: list[dict[str, float]] = [
        {"slot": 0, "repetition": 1.7, "temperature": 0.0},
        {"slot": 1, "presence": 1.5, "frequency": 0.4, "uniform": 0.3},
        {"slot": 2, "repetition": 0.6, "frequency": -0.5, "top_k": 30, "uniform": 0.8},
        {"slot": 1, "uniform": 0.9},  # no penalty
        {"slot": -1, "repetition": 2.0, "presence": 2.0, "uniform": 0.2},  # no counts
        {"slot": 0, "repetition": 1.3, "presence": 0.2, "top_p": 0.9, "uniform": 0.6},
        {"temperature": 0.0},
        {"uniform": 0.7, "min_p": 0.05},
    ]
    ids = torch.full((count, 5), -1, dtype=torch.int32, device=device)
    values = torch.zeros(count, 5, device=device)
    best = logits.topk(2).indices
    for row in (0, 1, 5, 6):
        ids[row, :3] = torch.tensor([best[row, 0].item(), 7, vocab - 1])
        values[row, :3] = torch.tensor([-math.inf, 9.5, 8.0])
    rows = replace(rows_of(cases, device), bias_ids=ids, bias_values=values)
    tokens, logprobs = sample(logits, rows, counts=counts)
    assert_drawn(tokens, logits, rows, counts)
    assert all(tokens[row] != best[row, 0] for row in (0, 1, 5, 6))
    plain = torch.log_softmax(logits.double(), -1).gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    assert torch.allclose(logprobs.double(), plain, atol=2e-5), "of the model's own distribution"
    unbiased, penalized = replace(rows, bias_ids=None), sample(logits, replace(rows, bias_ids=None), counts=counts)
    assert_drawn(penalized[0], logits, unbiased, counts)
    assert_drawn(sample(logits, rows)[0], logits, rows)


def _said(slot: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full_like(tokens, slot, dtype=torch.int32), tokens.int()


def test_equals_at_a_threshold_stay_in(device: torch.device) -> None:
    """Of four equal tokens top-k 2 and top-p 0.3 keep all four, and so each quarter of the unit draws its own."""
    logits = torch.full((1, 40), -5.0, device=device)
    logits[0, [3, 9, 20, 31]] = 2.0
    for filters in ({"top_k": 2}, {"top_p": 0.3}, {"top_k": 3, "top_p": 0.6}):
        rows = rows_of([{**filters, "uniform": u} for u in (0.1, 0.4, 0.6, 0.9)], device)
        assert sample(logits.repeat(4, 1), rows)[0].tolist() == [3, 9, 20, 31]


def test_thousands_of_equals_end_the_search(device: torch.device) -> None:
    """Bisection meets a value that more tokens share than are held in registers."""
    logits = torch.zeros(3, 5000, device=device)
    logits[:, 17] = 1.0
    rows = rows_of([{"top_k": 2, "uniform": 0.999999}, {"top_p": 0.5, "uniform": 0.999999}, {"top_k": 1}], device)
    assert sample(logits, rows)[0].tolist() == [4999, 4999, 17]


def test_greedy_takes_the_lowest_of_equals(device: torch.device) -> None:
    greedy = rows_of([{"temperature": 0.0}], device)
    for vocab in (1, 5, 47, 2500):
        logits = torch.zeros(1, vocab, device=device)
        logits[:, vocab // 2 :] = 3.0
        assert sample(logits, greedy)[0].tolist() == [vocab // 2]


def test_nothing_is_drawn_of_a_row_that_is_no_distribution(device: torch.device) -> None:
    """One logit that is no number, in the first tile or the last; all; or nothing at all. Beside a row that is one."""
    settings: list[dict[str, float]] = [{"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}, {}]
    for vocab, at in ((5, 0), (5, 4), (2500, 1100), (2500, 2499)):
        logits = torch.zeros(6, vocab, device=device)
        logits[::2, at] = math.nan
        rows = rows_of([one for one in settings for _ in range(2)], device)
        tokens, logprobs = sample(logits, rows)
        assert tokens[::2].tolist() == [NO_TOKEN] * 3
        assert logprobs[::2].isnan().all()
        assert tokens[1::2].min() >= 0
        assert logprobs[1::2].isfinite().all()
        for ours, wanted in zip((tokens, logprobs), reference_sample(logits, rows), strict=True):
            assert torch.equal(ours[::2].nan_to_num(-9), wanted[::2].nan_to_num(-9))
    for nothing in (math.nan, -math.inf):
        rows = rows_of(settings, device)
        assert sample(torch.full((3, 20), nothing, device=device), rows)[0].tolist() == [NO_TOKEN] * 3


def test_what_cannot_be_drawn_is_not_drawn(device: torch.device) -> None:
    """Masked tokens, and overflow past the greatest float; for u at both ends."""
    logits = torch.full((1, 100), -math.inf, device=device)
    logits[0, 41] = 1.0
    filters: list[dict[str, float]] = [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.2}]
    rows = rows_of([{**case, "uniform": u} for u in (0.0, 1 - 2**-53) for case in filters], device)
    assert sample(logits.repeat(8, 1), rows)[0].tolist() == [41] * 8
    huge = torch.tensor([[1.0, 3e38, 3e38, 0.0]], device=device).repeat(2, 1)
    rows = rows_of([{"temperature": 1e-6, "uniform": u} for u in (0.2, 0.7)], device)
    assert sample(huge, rows)[0].tolist() == [1, 2]


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = (torch.randn(4, 2100, generator=generator) * 4).to(device)
    rows = rows_of([random_case(generator) for _ in range(4)], device)
    tokens, logprobs = sample(logits, rows)
    for row in range(4):
        alone = sample(logits[row : row + 1], row_of(rows, row))
        assert alone[0].item() == tokens[row].item()
        assert alone[1].item() == logprobs[row].item()


def test_thousands_of_draws_follow_the_distribution(device: torch.device) -> None:
    """Pearson's chi-square of the likeliest, below its 99.9th percentile; the interpreter draws fewer, and of fewer."""
    vocab, draws, top_k, percentile = (40_000, 20_000, 24, 49.73) if device.type == "cuda" else (12, 300, 12, 31.26)
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(4)).to(device) / 2
    generator = torch.Generator().manual_seed(9)
    uniforms = torch.rand(draws, generator=generator, dtype=torch.float64).tolist()
    rows = rows_of([{"temperature": 1.2, "top_k": top_k, "uniform": u} for u in uniforms], device)
    tokens, _ = sample(logits.expand(draws, -1), rows)
    expected = reference_probabilities(logits, row_of(rows, 0))[0] * draws
    kept = expected > 0
    assert int(kept.sum()) == top_k
    assert expected[kept].min() > 5
    observed = torch.bincount(tokens.long().cpu(), minlength=vocab).double()
    assert observed[~kept].sum() == 0
    assert ((observed - expected)[kept] ** 2 / expected[kept]).sum() < percentile


@pytest.mark.oracle
def test_the_engines_own_sampler_draws_the_same(device: torch.device) -> None:
    """One seed, one token, whatever drew it: the worker's torch sampler beside the kernel."""
    sampler = pytest.importorskip("meshlm.worker.engine.sampler", reason="the worker's packages are not installed")
    from meshlm.worker.engine.sequence import Sequence
    from meshlm.worker.messages import Limits, Sampling, Submit

    generator = torch.Generator().manual_seed(21)
    vocab, cases = 1700, [random_case(generator) for _ in range(16)]
    logits = torch.stack([random_logits(generator, vocab, 2.0) for _ in cases])
    counts = torch.zeros(len(cases), vocab, dtype=torch.int32, device=device)
    sequences = []
    for row, case in enumerate(cases):
        best = logits[row].topk(12).indices.tolist()
        prompt, output = best[::2], best[::3] * (row % 3)
        penalties = {"repetition": 1.0 + row % 2 / 2, "presence": row % 4 / 2, "frequency": row % 5 / 5}
        sampling = Sampling(
            temperature=case["temperature"], top_p=case["top_p"], top_k=int(case["top_k"]), min_p=case["min_p"],
            seed=row, logit_bias={best[1]: 1.5, 3: -2.0}, logprobs=0,
            repetition_penalty=penalties["repetition"], presence_penalty=penalties["presence"],
            frequency_penalty=penalties["frequency"],
        )  # fmt: skip
        submit = Submit(id=str(row), prompt=prompt, sampling=sampling, limits=Limits(max_tokens=99))
        sequences.append(Sequence(submit, [*prompt, *output]))
        case |= penalties | {"slot": row, "uniform": sampler.uniform(row, len(output))}
        count_tokens(counts, *_said(row, torch.tensor(prompt, device=device)), prompt=True)
        count_tokens(counts, *_said(row, torch.tensor(output, dtype=torch.int32, device=device)))
    biased = [list(one.request.sampling.logit_bias) for one in sequences]
    bias_ids = torch.tensor(biased, dtype=torch.int32, device=device)
    bias_values = torch.tensor([[1.5, -2.0]] * len(cases), device=device)
    rows = replace(rows_of(cases, device), bias_ids=bias_ids, bias_values=bias_values)
    tokens, logprobs = sample(logits.to(device), rows, counts=counts)
    wanted = sampler.Sampler().sample(logits.clone(), sequences)
    assert tokens.tolist() == [entry.token for entry in wanted]
    assert logprobs.tolist() == pytest.approx([entry.logprob for entry in wanted], abs=2e-5)
    assert reference_sample(logits.to(device), rows, counts)[0].tolist() == tokens.tolist()


def test_counts_are_of_prompt_and_output(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    counts = torch.zeros(4, 300, dtype=torch.int32, device=device)
    wanted = counts.clone()
    for prompt in (True, False, True):
        slots = torch.randint(-1, 4, (400,), generator=generator, dtype=torch.int32).to(device)
        tokens = torch.randint(-1, 300, (400,), generator=generator, dtype=torch.int32).to(device)
        count_tokens(counts, slots, tokens, prompt=prompt)
        reference_count_tokens(wanted, slots, tokens, prompt=prompt)
    assert torch.equal(counts, wanted)
    beyond = (
        torch.tensor([4, 0], dtype=torch.int32, device=device),
        torch.tensor([0, 300], dtype=torch.int32).to(device),
    )
    count_tokens(counts, *beyond)
    assert torch.equal(counts, wanted), "what is not within counts is passed over"


def test_outputs_that_are_given_are_written_and_no_rows_are_no_work(device: torch.device) -> None:
    rows = rows_of([{"temperature": 0.0}] * 2, device)
    logits = torch.eye(2, 33, device=device)
    out = torch.zeros(2, dtype=torch.int32, device=device), torch.zeros(2, device=device)
    tokens, _ = sample(logits, rows, out=out)
    assert tokens is out[0]
    assert out[0].tolist() == [0, 1]
    empty, _ = sample(logits[:0], rows_of([], device))
    assert empty.shape == (0,)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, "logits"),
        ({"logits": torch.zeros(8)}, "logits"),
        ({"logits": torch.zeros(8, 2).t()}, "logits"),
        ({"logits": torch.zeros(2, 0)}, "logits"),
        ({"temperature": torch.ones(3)}, "rows.temperature"),
        ({"top_k": torch.ones(2)}, "rows.top_k"),
        ({"uniform": torch.ones(2)}, "rows.uniform"),
        ({"counts": torch.zeros(2, 9, dtype=torch.int32)}, "counts"),
        ({"counts": torch.zeros(2, 8, dtype=torch.int32), "slots": None}, "rows.slots"),
        ({"counts": torch.zeros(2, 8, dtype=torch.int32), "presence": None}, "rows"),
        ({"bias_ids": torch.zeros(2, 1, dtype=torch.int32)}, "rows.bias_values"),
        ({"bias_ids": torch.zeros(2, 3000, dtype=torch.int32)}, "rows.bias_ids"),
        ({"out": (torch.zeros(2, dtype=torch.int64), torch.zeros(2))}, "out"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], argument: str, device: torch.device) -> None:
    moved = {
        name: tuple(part.to(device) for part in item)
        if isinstance(item, tuple)
        else item
        if item is None
        else item.to(device)
        for name, item in change.items()
    }
    calls = {name: moved.pop(name) for name in ("logits", "counts", "out") if name in moved}
    rows = replace(rows_of([{}, {}], device), **moved)
    with pytest.raises(ArgumentError) as caught:
        sample(calls.pop("logits", torch.zeros(2, 8, device=device)), rows, **calls)
    assert caught.value.argument == argument
