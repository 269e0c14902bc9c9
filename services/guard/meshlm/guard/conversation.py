"""What is judged of a request: its turns, and where each lies in the whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from meshlm.chassis.parts import pieces
from meshlm.guard.judging import Turn
from meshlm.v1 import generation_pb2

# Between messages in a text judged as one.
_JOINT = "\n"
# Turns that are judged one by one; with more, neighbours are taken together up to so many characters.
_MANY = 100
_GATHERED = 400


def turns_of(source: generation_pb2.Input, token_text: str, trusted_roles: Collection[str]) -> list[Turn]:
    """The turns of an input; none for one that holds nothing.

    Offsets count through the contents of all messages, joined by one line feed; a prompt counts from 0. A speaker's
    name, which chat templates print, is a turn of its own: what is in it is told from where the message begins. So is
    each part of a message that is not its speaker's own; it is judged whoever sends it.
    """
    match source.WhichOneof("input"):
        case "prompt":
            return [Turn("user", source.prompt)]
        case "token_ids":
            return [Turn("user", token_text)]
        case "chat":
            turns, offset = [], 0
            for message in source.chat.messages:
                judged = message.role not in trusted_roles
                if message.name and judged:
                    turns.append(Turn(message.role, message.name, offset))
                for piece in pieces(message):
                    trusted = not piece.untrusted
                    turns.append(
                        Turn(message.role, piece.text, offset, untrusted=not trusted, judged=judged or not trusted)
                    )
                    offset += len(piece.text)
                offset += len(_JOINT)
            return turns
        case _:
            return []


def gathered(turns: Sequence[Turn]) -> list[Turn]:
    """Turns to be judged; where they are very many and short, neighbours of one kind together, as one text.

    A conversation of ten thousand lines costs as much as a document of its length, and not as ten thousand documents.
    """
    judged = [turn for turn in turns if turn.judged]
    if len(judged) <= _MANY:
        return judged
    made: list[Turn] = []
    for turn in judged:
        last = made[-1] if made else None
        follows = last is not None and turn.offset == last.offset + len(last.text) + len(_JOINT)
        if last is not None and follows and turn.untrusted == last.untrusted and len(last.text) < _GATHERED:
            made[-1] = replace(last, text=last.text + _JOINT + turn.text)
        else:
            made.append(turn)
    return made


def length_of(turns: list[Turn]) -> int:
    """Characters of all turns."""
    return sum(len(turn.text) for turn in turns) + len(_JOINT) * (len(turns) - 1)


def rewritten(
    source: generation_pb2.Input, trusted_roles: Collection[str], rewrite: Callable[[str], str]
) -> generation_pb2.Input | None:
    """The input with every text that is judged rewritten; None where that changes nothing, or for token ids."""
    changed = generation_pb2.Input()
    changed.CopyFrom(source)
    if changed.WhichOneof("input") == "prompt":
        changed.prompt = rewrite(source.prompt)
    for message in changed.chat.messages if changed.HasField("chat") else ():
        judged = message.role not in trusted_roles
        rewritten_pieces = [(p, rewrite(p.text) if judged or p.untrusted else p.text) for p in pieces(message)]
        if message.parts and any(piece.text != text for piece, text in rewritten_pieces):
            parts = [generation_pb2.Part(text=text, untrusted=piece.untrusted) for piece, text in rewritten_pieces]
            del message.parts[:]
            message.parts.extend(parts)
        elif not message.parts:
            message.content = rewritten_pieces[0][1]
        if message.name and judged and rewrite(message.name) != message.name:
            message.name = "redacted"  # a name has letters, digits, `_` and `-` only
    return changed if changed != source else None
