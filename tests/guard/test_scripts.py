"""Policies that want certain scripts only."""

from __future__ import annotations

import pytest
from asking import verdict_of

from meshlm.chassis.config import ConfigError, Source
from meshlm.guard.config import GuardConfig, PolicyConfig
from meshlm.guard.policy import ALLOW, BLOCK, FLAG, Policy

RUSSIAN = "Где находится ближайшая аптека?"
LATIN = Policy(PolicyConfig(scripts=("Latin",)))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("What is the capital of France? 🙂 1234", ALLOW),
        ("Quelle est la capitale, où ça ?", ALLOW),
        (RUSSIAN, BLOCK),
        ("請問圖書館幾點開門，謝謝", BLOCK),
        (f"Translate this please: {RUSSIAN}", BLOCK),
        ("Who was Пушкин, and is π a number? Tell me in a sentence or two, with dates and places.", ALLOW),
        ("¿?", ALLOW),
        ("", ALLOW),
    ],
)
def test_a_text_in_another_script_is_refused_and_a_word_of_it_is_not(text: str, action: int) -> None:
    verdict = verdict_of(LATIN, text)
    assert verdict.action == action
    assert ("language.script" in verdict.categories) == (action == BLOCK)
    assert "scripts/1" in verdict.detectors


def test_which_scripts_and_what_follows_are_the_policys() -> None:
    assert verdict_of(Policy(PolicyConfig(scripts=("Latin", "Cyrillic"))), RUSSIAN).action == ALLOW
    assert verdict_of(Policy(PolicyConfig(scripts=("Latin",), actions={"language": "flag"})), RUSSIAN).action == FLAG
    assert verdict_of(Policy(PolicyConfig()), RUSSIAN).action == ALLOW


def test_a_script_that_there_is_not_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"guard\.policies\.x.*Klingon"):
        Source({"guard": {"policies": {"x": {"scripts": ["Klingon"]}}}}, {}).section("guard", GuardConfig)
