"""Policies that want certain languages only."""

from __future__ import annotations

import pytest
from asking import verdict_of
from multilingual import DECLARATION, EVERYDAY

from meshlm.chassis.config import ConfigError, Source
from meshlm.guard.config import GuardConfig, PolicyConfig
from meshlm.guard.policy import ALLOW, BLOCK, FLAG, Policy

ENGLISH = Policy(PolicyConfig(languages=("en",)))
CODES = {
    "English": "en",
    "German": "de",
    "French": "fr",
    "Dutch": "nl",
    "Russian": "ru",
    "Chinese": "zh",
    "Hindi": "hi",
}
CODE = "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n"


@pytest.mark.parametrize("name", CODES)
def test_only_a_policys_own_languages_pass(name: str) -> None:
    text, own = DECLARATION[name], CODES[name]
    assert verdict_of(Policy(PolicyConfig(languages=(own, "it"))), text).action == ALLOW
    others = tuple(code for code in CODES.values() if code != own)
    verdict = verdict_of(Policy(PolicyConfig(languages=others)), text)
    assert (verdict.action, list(verdict.categories)) == (BLOCK, ["language.other"])
    assert "languages/1" in verdict.detectors


@pytest.mark.parametrize(
    "text",
    ["", "Hola, ¿qué tal?", "ok", "12 + 30 = ?", CODE, '{"a": [1, 2, 3], "b": null}', EVERYDAY["leet that is none"]],
)
def test_what_is_short_or_no_language_is_not_guessed_at(text: str) -> None:
    assert verdict_of(ENGLISH, text).action == ALLOW


def test_a_long_text_is_judged_by_its_beginning_and_at_once() -> None:
    assert verdict_of(ENGLISH, DECLARATION["German"] * 5_000).action == BLOCK


def test_what_follows_and_whether_it_is_asked_is_the_policys() -> None:
    german = DECLARATION["German"]
    flagging = Policy(PolicyConfig(languages=("en",), actions={"language.other": "flag"}))
    allowing = Policy(PolicyConfig(languages=("en",), actions={"language": "allow"}))
    assert [verdict_of(policy, german).action for policy in (flagging, allowing, Policy(PolicyConfig()))] == [
        FLAG,
        ALLOW,
        ALLOW,
    ]
    assert ENGLISH.version != Policy(PolicyConfig()).version


def test_norwegian_has_two_names() -> None:
    text = "Alle mennesker er født frie og med samme menneskeverd og menneskerettigheter, i fornuft og samvittighet."
    assert verdict_of(Policy(PolicyConfig(languages=("nb",))), text).action == ALLOW


def test_a_language_that_is_not_known_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"guard\.policies\.x.*tlh"):
        Source({"guard": {"policies": {"x": {"languages": ["en", "tlh"]}}}}, {}).section("guard", GuardConfig)
