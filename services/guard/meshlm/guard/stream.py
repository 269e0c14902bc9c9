"""Judging an answer while it is made: what may go out, and what must wait for the next characters.

Text is released as soon as it can no longer become part of something that stops the answer; where a model judges too,
not before it has. The verdict and what was released at the end depend on the text alone, not on how it was cut: a match
counts from the least prefix that has it, and the model judges prefixes of fixed lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from meshlm.guard.findings import Finding
from meshlm.guard.patterns import Pattern, PatternSet
from meshlm.guard.windows import WINDOW

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


# Characters between the places where the model judges, about 8 and 16 tokens; and up to where it is the first.
_SHORT, _LONG, _SHORT_UNTIL = 32, 64, 512


class ContentWatch:
    """Judges a growing text at fixed places: what has come by then, its last `WINDOW` characters where it is longer."""

    def __init__(self, judge: Callable[[str], tuple[Finding, bool] | None], *, strict: bool) -> None:
        """`judge`: what is wrong with a text, and whether it stops the answer. `strict`: hold what is not judged."""
        self._judge = judge
        self._strict = strict
        self._tail = ""
        self._length = 0
        self._judged = 0
        self.found: Finding | None = None
        self.flagged: Finding | None = None

    @property
    def room(self) -> int:
        """Characters to the next place; feed no more at a time."""
        return self._judged + (_SHORT if self._judged < _SHORT_UNTIL else _LONG) - self._length

    def clear(self, length: int) -> int:
        """Characters that this watch lets go, of `length`."""
        return self._judged if self._strict or self.found is not None else length

    def feed(self, text: str, *, last: bool = False) -> bool:
        """Take the next characters. Whether the answer is to stop."""
        self._tail = (self._tail + text)[-WINDOW:]
        self._length += len(text)
        if self.found is None and self._length > self._judged and (last or self.room == 0):
            wrong = self._judge(self._tail)
            if wrong is not None:
                start = self._length - len(self._tail)
                finding = replace(wrong[0], start=start, end=self._length)
                if wrong[1]:
                    self.found = finding
                    return True
                self.flagged = self.flagged or finding
            self._judged = self._length
        return self.found is not None


class OutputCheck:
    """The check of one choice."""

    def __init__(self, blocking: PatternSet, flagging: list[PatternSet], content: ContentWatch | None = None) -> None:
        self._blocking = Watch(blocking)
        self._flagging = [Watch(patterns) for patterns in flagging]
        self._content = content
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
        if self._blocking.found is None and self._content is not None:
            return self._content.found
        return self._blocking.found

    @property
    def decided(self) -> bool:
        """Whether the verdict is final: the text has ended, or is stopped."""
        return self.ended or self.blocked is not None

    @property
    def flagged(self) -> list[Finding]:
        found = [watch.found for watch in self._flagging if watch.found is not None]
        if self._content is not None and self._content.flagged is not None:
            found.append(self._content.flagged)
        return found

    def feed(self, text: str, *, last: bool = False) -> None:
        """Take the text that follows; with `last`, all that is clean is released."""
        at = 0
        while at < len(text) and self.blocked is None:
            step = _STEP if self._content is None else min(_STEP, self._content.room)
            self._step(text[at : at + step])
            at += step
        self._length += len(text)
        if last and not self.ended:
            self.ended = True
            self._step(_END, last=True)
        self._released = self._length if self.ended and self.blocked is None else self._clear()

    def _clear(self) -> int:
        if self._content is None:
            return self._blocking.clear
        return min(self._blocking.clear, self._content.clear(self._seen))

    def _step(self, text: str, *, last: bool = False) -> None:
        if self.blocked is not None:
            return
        if self._blocking.feed(text):
            # What comes after the end of an answer is not judged, or verdicts would depend on the last delta's size.
            text = text[: self._blocking.decided_at - self._seen]
        elif self._content is not None:
            self._content.feed("" if last else text, last=last)
        self._seen += len(text)
        for watch in self._flagging:
            watch.feed(text)


def by_category(patterns: list[Pattern]) -> list[PatternSet]:
    """One set for each category, so that each is found once."""
    categories = dict.fromkeys(pattern.category for pattern in patterns)
    return [PatternSet(p for p in patterns if p.category == category) for category in categories]
