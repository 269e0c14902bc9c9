"""A policy's rules on tool calls and canaries, through the check of an answer."""

from __future__ import annotations

import pytest
from asking import feed

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
