"""An answer as its reader saw it."""

from __future__ import annotations

from meshlm.mesh.events import Moderated, Text
from meshlm.mesh.told import Told
from meshlm.v1 import generation_pb2


def text(words: str) -> Text:
    return Text(words, 0, 0, 1, (), (), generation_pb2.Usage(completion_tokens=1))


def moderated(action: str, start: int, end: int) -> Moderated:
    return Moderated(0, action, end, start, end, ("S1",), 0.99)


def test_what_the_guard_takes_back_is_no_part_of_the_conversation_and_the_reader_is_told() -> None:
    told = Told()
    assert told.hear(text("All is well, but this is not")) == "All is well, but this is not"
    assert told.hear(moderated("pass", 0, 12)) == ""
    assert "took back" in told.hear(moderated("retract", 11, 28))
    assert told.text == "All is well"


def test_a_stop_is_told_and_takes_nothing_back() -> None:
    told = Told()
    told.hear(text("All is well"))
    assert "S1" in told.hear(moderated("stop", 11, 20))
    assert told.text == "All is well"
