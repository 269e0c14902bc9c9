"""Judging an answer while it is made: what may go out, and what must wait for the next characters.

Text is released as soon as it can no longer become part of something that stops the answer. The verdict and what was
released at the end depend on the text alone, not on how it was cut: a match counts from the least prefix that has it.
"""

from __future__ import annotations

from dataclasses import replace

from meshlm.guard.findings import Finding
from meshlm.guard.patterns import Pattern, PatternSet

# A large delta is taken in steps: each step costs in proportion to the tail and to its own length.
_STEP = 512
# Stands for the end of the text: it ends every word and number.
_END = "\n"


class Watch:
    """Looks for a set of patterns in a growing text, until it finds one."""

    def __init__(self, patterns: PatternSet) -> None:
        self._patterns = patterns
        self._tail = ""
        self._offset = 0  # of the tail, in the text
        self.found: Finding | None = None
        self.decided_at = 0  # characters of the text that it took to find it
        self.clear = 0  # characters of the text that cannot be part of a match any more

    def feed(self, text: str) -> bool:
        """Take the next characters; at most a step's worth. Whether something has been found, now or before."""
        if self.found is not None:
            return True
        tail, known = self._tail + text, len(self._tail)
        begin = min(1, self._offset)  # the first character is context, but for the text's own first
        decided = self._patterns.first(tail, begin, known)
        if decided is not None:
            finding, end = decided
            held = min(finding.start, self._patterns.hold(tail[: end - 1], begin))
            self.clear, self.decided_at = self._offset + held, self._offset + end
            self.found = replace(finding, start=finding.start + self._offset, end=finding.end + self._offset)
            self._tail = ""
            return True
        held = self._patterns.hold(tail, begin)
        self.clear = self._offset + held
        # One character more is kept: patterns look at what stands before them.
        cut = max(0, held - 1)
        self._tail, self._offset = tail[cut:], self._offset + cut
        return False


class OutputCheck:
    """The check of one choice."""

    def __init__(self, blocking: PatternSet, flagging: list[PatternSet]) -> None:
        self._blocking = Watch(blocking)
        self._flagging = [Watch(patterns) for patterns in flagging]
        self._length = 0
        self._seen = 0  # by the watches
        self._released = 0
        self.ended = False

    @property
    def length(self) -> int:
        """Characters seen."""
        return self._length

    @property
    def released(self) -> int:
        """Characters that may go out; never falls."""
        return self._released

    @property
    def blocked(self) -> Finding | None:
        return self._blocking.found

    @property
    def decided(self) -> bool:
        """Whether the verdict is final: the text has ended, or is stopped."""
        return self.ended or self._blocking.found is not None

    @property
    def flagged(self) -> list[Finding]:
        return [watch.found for watch in self._flagging if watch.found is not None]

    def feed(self, text: str, *, last: bool = False) -> None:
        """Take the text that follows; with `last`, all that is clean is released."""
        for at in range(0, len(text), _STEP):
            self._step(text[at : at + _STEP])
        self._length += len(text)
        if last and not self.ended:
            self.ended = True
            self._step(_END)
        self._released = self._length if self.ended and self.blocked is None else self._blocking.clear

    def _step(self, text: str) -> None:
        if self._blocking.found is not None:
            return
        if self._blocking.feed(text):
            # What comes after the end of an answer is not judged, or verdicts would depend on the last delta's size.
            text = text[: self._blocking.decided_at - self._seen]
        self._seen += len(text)
        for watch in self._flagging:
            watch.feed(text)


def by_category(patterns: list[Pattern]) -> list[PatternSet]:
    """One set for each category, so that each is found once."""
    categories = dict.fromkeys(pattern.category for pattern in patterns)
    return [PatternSet(p for p in patterns if p.category == category) for category in categories]
