"""What is asked about a conversation: all that is to be judged, in parts that fit, in few questions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshlm.guard.judging import Turn
from meshlm.guard.llama.config import LlamaGuardConfig
from meshlm.guard.llama.tasks import of_answer, of_prompt

CONFIG = LlamaGuardConfig(segment_chars=100, context_chars=60)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])


def conversation(*said: tuple[str, str, bool]) -> list[Turn]:
    turns, offset = [], 0
    for role, text, judged in said:
        turns.append(Turn(role, text, offset, judged=judged))
        offset += len(text) + 1
    return turns


@given(st.lists(st.tuples(ROLES, st.text(alphabet="ab ", max_size=400), st.booleans()), max_size=12))
def test_every_character_to_be_judged_is_in_some_question(said: list[tuple[str, str, bool]]) -> None:
    turns = conversation(*said)
    asked = of_prompt(turns, CONFIG)
    covered = {at for task in asked for at in range(task.start, task.end)}
    for turn in turns:
        if turn.judged:
            wanted = {turn.offset + at for at, letter in enumerate(turn.text) if letter != " "}
            assert wanted <= covered
    assert all(len(task.text) <= 100 for task in asked)
    assert all(sum(len(text) for _, text in task.context) <= 60 for task in asked)
    # Two turns in a row that were not asked about together did not fit together.
    total = sum(len(turn.text) for turn in turns if turn.judged)
    speakers = sum(turn.judged for turn in turns)
    assert len(asked) <= min(speakers, 2 + 2 * total // 50 + speakers) + total // 90


def test_ten_thousand_short_turns_are_few_questions() -> None:
    turns = conversation(*[("user", "hi", True)] * 10_000)
    assert len(of_prompt(turns, LlamaGuardConfig())) == 1 + -(-9_999 * 4 // 6_000)


def test_the_last_turn_is_judged_after_what_was_said_before_it() -> None:
    turns = conversation(
        ("system", "be brief", False), ("user", "one", True), ("assistant", "two", False), ("user", "three", True)
    )
    last, earlier = of_prompt(turns, CONFIG)
    assert last.turns == [("User", "one"), ("Agent", "two"), ("User", "three")]
    assert (last.start, last.end) == (17, 22)
    assert earlier.turns == [("User", "one")]


def test_a_document_that_an_assistant_passes_on_is_judged_as_what_comes_in() -> None:
    turns = [Turn("user", "one"), Turn("assistant", "a page", 4, untrusted=True)]
    assert of_prompt(turns, CONFIG)[0].turns == [("User", "one"), ("User", "a page")]


def test_of_a_long_conversation_the_latest_is_read_along() -> None:
    turns = conversation(("user", "x" * 200, False), ("assistant", "y" * 50, False), ("user", "z", True))
    (task,) = of_prompt(turns, CONFIG)
    assert task.context == (("User", "x" * 10), ("Agent", "y" * 50))


@given(st.text(alphabet="ab", min_size=1, max_size=900), st.integers(1, 900))
def test_parts_of_an_answer_stay_while_it_grows(answer: str, length: int) -> None:
    turns = conversation(("user", "tell me", False))
    before, now = of_answer(turns, answer[:length], CONFIG), of_answer(turns, answer, CONFIG)
    assert now[: len(before) - 1] == before[:-1]
    assert now[-1].end == len(answer)


@given(st.text(alphabet="ab", min_size=64, max_size=500), st.integers(0, 4))
def test_a_question_that_does_not_fit_gets_smaller_until_it_does(text: str, before: int) -> None:
    turns = conversation(*[("user", f"turn {n}", False) for n in range(before)], ("user", text, True))
    todo, seen = of_prompt(turns, LlamaGuardConfig()), set()
    while todo:
        task = todo.pop()
        parts = task.smaller()
        assert all(len(str(part.turns)) < len(str(task.turns)) for part in parts)
        if not parts:
            assert len(task.text) < 64
            assert not task.context
            assert text[task.start - turns[-1].offset : task.end - turns[-1].offset] == task.text
            seen |= set(range(task.start, task.end))
        todo += parts
    assert seen == set(range(turns[-1].offset, turns[-1].offset + len(text)))


def test_nothing_to_judge_is_no_question() -> None:
    assert of_prompt(conversation(("system", "x", False), ("user", " \n", True)), CONFIG) == []
    assert of_answer([], "", CONFIG) == []
