"""Only a verdict is a verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.guard.llama.verdicts import Verdict, VerdictError, parse

KNOWN = [f"S{number}" for number in range(1, 15)]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("safe", Verdict(unsafe=False)),
        ("\n\nsafe", Verdict(unsafe=False)),
        ("safe \n", Verdict(unsafe=False)),
        ("\n\nunsafe\nS1", Verdict(unsafe=True, categories=("S1",))),
        ("unsafe\nS10,S2,S14", Verdict(unsafe=True, categories=("S10", "S2", "S14"))),
        ("unsafe\nS2,S2", Verdict(unsafe=True, categories=("S2",))),
    ],
)
def test_a_verdict_is_read(text: str, verdict: Verdict) -> None:
    assert parse(text, KNOWN) == verdict


@pytest.mark.parametrize(
    "text",
    [
        "", "Safe", "safe.", "safe\nS1", "unsafe", "unsafe\n", "unsafe S1", "unsafe\nS1 S2", "unsafe\nS1,",
        "unsafe\ns1",
        "unsafe\nS1, S2", "unsafe\nS15", "unsafe\nO1", "unsafe\nS100", "safe unsafe\nS1", "unsafe\n\nS1", "not safe",
        "unsafe\nS1\nbecause", "I cannot judge this.", "unsafe\nS\u0661",
    ],
)  # fmt: skip
def test_what_is_no_verdict_is_refused(text: str) -> None:
    with pytest.raises(VerdictError):
        parse(text, KNOWN)


@given(st.text())
def test_no_text_is_taken_for_a_verdict_that_it_does_not_spell(text: str) -> None:
    try:
        verdict = parse(text, KNOWN)
    except VerdictError:
        return
    assert text.split()[0] == ("unsafe" if verdict.unsafe else "safe")


@given(st.lists(st.sampled_from(KNOWN), min_size=1, unique=True), st.sampled_from(["", "\n\n", " "]))
def test_every_verdict_that_the_grammar_has_is_read(codes: list[str], space: str) -> None:
    assert parse(f"{space}unsafe\n{','.join(codes)}{space}", KNOWN).categories == tuple(codes)
