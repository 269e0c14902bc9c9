"""Ranges of an answer that the guard replaces, and where everything else then stands."""

from __future__ import annotations

from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2


class Redactions:
    """The replaced ranges of a choice's text, in order. Positions are characters of the text as the worker sent it."""

    def __init__(self) -> None:
        self._ranges: list[guard_pb2.Redaction] = []

    def __bool__(self) -> bool:
        return bool(self._ranges)

    @property
    def end(self) -> int:
        """Where the last of them ends."""
        return self._ranges[-1].char_end if self._ranges else 0

    def add(self, found: guard_pb2.Redaction) -> None:
        """The next range; it begins where the last ends, or later."""
        self._ranges.append(found)

    def rewrite(self, chunk: pb.Chunk, start: int) -> pb.Chunk:
        """The chunk as it may go out; `start` is where its text stands.

        What takes a range's place goes with its first character. Of a chunk in which something was replaced, tokens
        and log-probabilities are withheld: they would spell it.
        """
        end = start + len(chunk.text)
        touched = [found for found in self._ranges if found.char_start < end and found.char_end > start]
        if not touched:
            return chunk
        parts, at = [], start
        for found in touched:
            parts.append(chunk.text[at - start : max(at, found.char_start) - start])
            if found.char_start >= start:
                parts.append(found.replacement)
            at = min(end, found.char_end)
        parts.append(chunk.text[at - start :])
        rewritten = pb.Chunk()
        rewritten.CopyFrom(chunk)
        rewritten.text = "".join(parts)
        del rewritten.token_ids[:]
        del rewritten.logprobs[:]
        return rewritten

    def place(self, position: int) -> int:
        """Where a position is in the rewritten text; one inside a range is at its end."""
        moved = position
        for found in self._ranges:
            if found.char_start >= position:
                break
            moved += len(found.replacement) - (min(found.char_end, position) - found.char_start)
        return moved
