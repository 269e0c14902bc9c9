"""A fact or an invention: what the words of a prompt tell."""

from __future__ import annotations

import pytest

from meshlm.router.routing.tasks import ends_of, last_words, task_of
from meshlm.v1 import generation_pb2 as pb


def chat(*turns: tuple[str, str]) -> pb.Input:
    return pb.Input(chat=pb.Chat(messages=[pb.Message(role=role, content=text) for role, text in turns]))


@pytest.mark.parametrize(
    ("text", "task"),
    [
        ("What is the capital of France?", "factual"),
        ("Translate to German: the poem is long", "factual"),
        ("Who wrote the poem The Raven?", "factual"),
        ("please summarise this story: once there was", "factual"),
        ("17 * 23", "factual"),
        ("Name the planet.\nA. Mars\nB. Pluto", "factual"),
        ("Write a poem about what rain is", "creative"),
        ("Brainstorm names for a cafe", "creative"),
        ("tell me a joke", "creative"),
        ("Continue: once upon a time", "creative"),
        ("Hello", "unknown"),
        ("Write an email to my landlord about the heating", "unknown"),
        ("Schreibe ein Gedicht", "unknown"),
    ],
)
def test_words_tell_the_task_or_nothing(text: str, task: str) -> None:
    assert task_of(pb.Input(prompt=text)) == task
    assert task_of(chat(("user", text))) == task


def test_only_the_last_thing_the_user_said_counts() -> None:
    turns = (("system", "You write poems: write a poem"), ("user", "Tell me a story"), ("assistant", "No."))
    assert task_of(chat(*turns, ("user", "What is 2 + 2?"))) == "factual"
    assert last_words(chat(("system", "only"))) == ""
    assert task_of(pb.Input(token_ids=pb.TokenIds(ids=[1]))) == "unknown"


def test_a_document_in_the_middle_does_not_hide_what_is_asked() -> None:
    assert task_of(pb.Input(prompt="x " * 50_000 + "\nWrite a haiku about it.")) == "creative"


def test_a_long_text_is_searched_no_further_than_a_short_one() -> None:
    assert [len(ends_of("x" * size)) for size in (800, 801, 500_000)] == [800, 801, 801]
    assert ends_of("a" * 400 + "b" * 1000 + "c" * 400) == "a" * 400 + "\n" + "c" * 400
