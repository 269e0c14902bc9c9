"""A policy's rules on tool calls and canaries, through the check of an answer."""

from __future__ import annotations

import pytest
from asking import feed
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.guard.config import PolicyConfig
from meshlm.guard.policy import ALLOW, BLOCK, FLAG, Policy
from meshlm.v1 import generation_pb2 as pb

BAD = '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'
GOOD = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
CANARY = "3fa85f6457174562b3fc2c963f66afa6"


def answered(config: PolicyConfig, text: str) -> tuple[pb.Verdict, int]:
    policy = Policy(config)
    check = policy.output_check(canaries=[CANARY])
    for at in range(0, len(text), 3):
        feed(check, text[at : at + 3])
    feed(check, "", last=True)
    return policy.judge_output(check), check.released


@pytest.mark.parametrize(
    ("mode", "tools", "text", "categories"),
    [
        ("any", {}, BAD, []),
        ("listed", {"now": "{}"}, BAD, ["tool.unknown"]),
        ("listed", {"now": "{}"}, GOOD, []),
        ("listed", {"now": '{"required": ["zone"]}'}, GOOD, ["tool.arguments"]),
        ("none", {}, GOOD, ["tool.unknown"]),
        ("none", {}, GOOD[:30], ["tool.malformed"]),
    ],
)
def test_a_call_follows_the_policy(mode: str, tools: dict[str, str], text: str, categories: list[str]) -> None:
    verdict, released = answered(PolicyConfig(tool_calls=mode, tools=tools), f"Well: {text}")  # type: ignore[arg-type]
    assert list(verdict.categories) == categories
    assert verdict.action == (BLOCK if categories else ALLOW)
    assert released == (len("Well: ") if categories else len(f"Well: {text}"))
    assert ("tool_calls/1" in verdict.detectors) == (mode != "any")


def test_an_action_may_let_it_be_told_only() -> None:
    config = PolicyConfig(tool_calls="none", actions={"tool": "flag", "leak": "flag"})
    verdict, released = answered(config, f"{BAD} {CANARY}")
    assert (verdict.action, sorted(verdict.categories)) == (FLAG, ["leak.canary", "tool.unknown"])
    assert released == len(f"{BAD} {CANARY}")


def test_the_earlier_of_two_findings_stops_the_answer() -> None:
    assert list(answered(PolicyConfig(tool_calls="none"), f"{CANARY} {BAD}")[0].categories) == ["leak.canary"]
    assert list(answered(PolicyConfig(tool_calls="none"), f"{BAD} {CANARY}")[0].categories) == ["tool.unknown"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": {"now": "{}"}}, "no meaning"),
        ({"tool_calls": "listed", "tools": {"now": "{"}}, r"tools\.now: no JSON"),
        ({"tool_calls": "listed", "tools": {"now": '{"type": 5}'}}, r"tools\.now: no JSON schema"),
        ({"tool_call_chars": 3}, "tool_call_chars"),
        ({"indirect_block_score": 0.1}, "indirect_flag_score"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**fields)  # type: ignore[arg-type]


PIECES = st.sampled_from(
    [
        BAD,
        GOOD,
        CANARY,
        CANARY[:16],
        "-".join(CANARY[::-1]),
        "<tool_call>",
        "{",
        '"',
        "words ",
        "3fa8",
        "\n",
        "[TOOL_CALLS]",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=8), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_any_cut_of_an_answer_gives_the_same_verdict_and_releases_no_more(pieces: list[str], sizes: list[int]) -> None:
    text = "".join(pieces)
    policy = Policy(PolicyConfig(tool_calls="listed", tools={"now": "{}"}))
    whole, cut = policy.output_check(canaries=[CANARY]), policy.output_check(canaries=[CANARY])
    feed(whole, text, last=True)
    at, number = 0, 0
    while at < len(text) and not cut.decided:
        size = sizes[number % len(sizes)]
        feed(cut, text[at : at + size])
        at, number = at + size, number + 1
        assert BAD not in text[: cut.released]
        assert CANARY not in text[: cut.released]
    if not cut.decided:
        feed(cut, "", last=True)
    assert policy.judge_output(cut) == policy.judge_output(whole)
    assert cut.released == whole.released
