"""The text of a turn, which may come in parts: what it says, and which of it is not the speaker's own."""

from __future__ import annotations

from typing import NamedTuple

from meshlm.v1 import generation_pb2 as pb


class Piece(NamedTuple):
    """A run of a turn's text."""

    text: str
    # It is not the speaker's own: a document, a web page, what a tool returned.
    untrusted: bool


def pieces(message: pb.Message) -> list[Piece]:
    """The turn's text, neighbours of one kind joined; at least one piece."""
    theirs = message.role == "tool"
    found = [Piece(message.content, theirs)] if not message.parts else []
    for part in message.parts:
        untrusted = part.untrusted if part.HasField("untrusted") else theirs
        if found and found[-1].untrusted == untrusted:
            found[-1] = Piece(found[-1].text + part.text, untrusted)
        else:
            found.append(Piece(part.text, untrusted))
    return found


def content_of(message: pb.Message) -> str:
    """The turn's whole text."""
    return "".join(part.text for part in message.parts) if message.parts else message.content
