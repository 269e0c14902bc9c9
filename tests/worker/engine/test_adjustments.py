"""What the native engine does to logits before the draw, in numpy, against the sampler's own in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.adjustments import Adjustments, Report
from meshlm.worker.engine.sampler import Sampler
from meshlm.worker.engine.sequence import Sequence
from meshlm.worker.messages import Limits, Sampling, Submit

VOCAB = 40
tokens = st.integers(0, VOCAB - 1)
penalties = st.sampled_from([-1.5, 0.0, 0.0, 0.7, 2.0])


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    sampling = Sampling(
        logprobs=draw(st.sampled_from([None, 0, 3, VOCAB])),
        logit_bias=draw(st.dictionaries(tokens, st.sampled_from([-100.0, -0.3, 2.5]), max_size=4)),
        repetition_penalty=draw(st.sampled_from([0.5, 1.0, 1.0, 1.3])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
    )
    limits = Limits(
        max_tokens=100, min_tokens=draw(st.sampled_from([0, 4])), stop_token_ids=draw(st.sets(tokens, max_size=3))
    )
    prompt = draw(st.lists(tokens, min_size=1, max_size=12))
    request = Submit(id="s", prompt=prompt, sampling=sampling, limits=limits)
    return Sequence(request, [*prompt, *draw(st.lists(tokens, max_size=12))])


@given(rows=st.lists(sequences(), min_size=1, max_size=4), seed=st.integers(0, 99), more=st.lists(tokens, max_size=3))
@settings(deadline=None, max_examples=50)
def test_logits_and_reports_are_those_of_torch_step_after_step(
    rows: list[Sequence], seed: int, more: list[int]
) -> None:
    ours, theirs = Adjustments(), Sampler()
    generator = torch.Generator().manual_seed(seed)
    for token in (None, *more):
        if token is not None:
            for row in rows:
                row.tokens.append(token)
        logits = torch.randn(len(rows), VOCAB, generator=generator) * 3
        adjusted = logits.numpy().copy()
        reports, wanted = ours.prepare(adjusted, rows), theirs.prepare(logits, rows)
        torch.testing.assert_close(torch.from_numpy(adjusted), logits, rtol=1e-6, atol=1e-6)
        assert reports.keys() == wanted.keys()
        for row in reports:
            found, right = reports[row].sampled(7), wanted[row].sampled(7)
            assert found.logprob == pytest.approx(right.logprob, abs=1e-5)
            assert [entry.token for entry in found.top] == [entry.token for entry in right.top]
            assert [entry.logprob for entry in found.top] == pytest.approx([e.logprob for e in right.top], abs=1e-5)


def row(*logits: float) -> Any:
    return np.array(logits, np.float32)


def test_of_equal_log_probabilities_the_lower_token_is_told_first_and_no_more_than_there_are() -> None:
    report = Report(row(0.0, 1.0, 1.0, -np.inf), 9)
    assert [entry.token for entry in report.sampled(0).top] == [1, 2, 0, 3]
    assert report.sampled(3).logprob == -np.inf


def test_a_sequence_that_was_forgotten_has_said_nothing() -> None:
    """Its number may be another's: what was counted for it is gone."""
    sampling = Sampling(frequency_penalty=1.0)
    request = Submit(id="s", prompt=[0], sampling=sampling, limits=Limits(max_tokens=9))
    said, adjustments = Sequence(request, [0, 1, 1]), Adjustments()
    first = row(*[0.0] * 4)
    adjustments.prepare(first[None], [said])
    assert first.tolist() == [0.0, -2.0, 0.0, 0.0]
    adjustments.forget(said)
    said.tokens = [0, 2]
    second = row(*[0.0] * 4)
    adjustments.prepare(second[None], [said])
    assert second.tolist() == [0.0, 0.0, -1.0, 0.0]
