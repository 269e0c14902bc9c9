"""What is looked for in a growing text, and what must be held back for it meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from meshlm.guard.findings import Finding
from meshlm.guard.patterns import Pattern, PatternSet

# Stands for the end of the text: it ends every word and number.
_END = "\n"


class Watch(Protocol):
    """Looks for one kind of thing in a growing text, until it finds it.

    What it finds, where, and what it lets go by then depend on the text so far, not on how it came. A check copies
    its watches (`copy.copy`): their state is values that are replaced, never changed in place.
    """

    # What was found; None so far.
    found: Finding | None
    # Characters of the text that it took to find it; where it took the end, one more than the text has.
    decided_at: int
    # Characters of the text that cannot be part of a finding any more. Never falls.
    clear: int

    def feed(self, text: str, *, last: bool = False) -> bool:
        """Take the next characters, at most some hundreds; `last`: the text ends with them. Whether something has been
        found, now or before. Not called again after `last`."""
        ...


class PatternWatch:
    """Looks for a set of patterns."""

    def __init__(self, patterns: PatternSet) -> None:
        self._patterns = patterns
        self._tail = ""
        self._offset = 0  # of the tail, in the text
        self.found: Finding | None = None
        self.decided_at = 0
        self.clear = 0

    def feed(self, text: str, *, last: bool = False) -> bool:
        """See `Watch`."""
        if self.found is not None:
            return True
        if last:
            text += _END
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


@dataclass(frozen=True)
class Redacted:
    """A range of the text that something else takes the place of."""

    finding: Finding
    # Characters of the text that it took to find it.
    decided_at: int

    @property
    def replacement(self) -> str:
        """What takes its place: says what was there, and nothing of it."""
        return f"[{self.finding.category}]"


class Redactor:
    """A `Watch` that never stops a text: it finds each match of a set of patterns, from left to right, none inside
    another."""

    def __init__(self, patterns: PatternSet) -> None:
        self._patterns = patterns
        self._tail = ""
        self._offset = 0  # of the tail, in the text
        self.found: Finding | None = None
        self.decided_at = 0
        self.clear = 0
        self.redacted: tuple[Redacted, ...] = ()
        self._open: Finding | None = None  # of which more may follow; the tail begins where its deciding part ends
        self._last = ""  # the last character of that part
        self._length = 0

    def feed(self, text: str, *, last: bool = False) -> bool:
        """See `Watch`."""
        self._length += len(text)
        tail, known = self._tail + text + (_END if last else ""), len(self._tail)
        while True:
            if self._open is not None:
                more, grows = self._patterns.rest(self._open.category, tail)
                if grows and not last:
                    self._tail = tail
                    return False
                tail, known = self._close(self._open, tail, more), 1
            decided = self._patterns.first(tail, min(1, self._offset), known)
            if decided is None:
                break
            finding = decided[0]
            self._open = replace(finding, start=finding.start + self._offset, end=finding.end + self._offset)
            self.clear, self._last = self._open.start, tail[finding.end - 1]
            tail, self._offset = tail[finding.end :], self._offset + finding.end
        held = self._patterns.hold(tail, min(1, self._offset))
        self.clear = self._offset + held
        # One character more is kept: patterns look at what stands before them.
        cut = max(0, held - 1)
        self._tail, self._offset = tail[cut:], self._offset + cut
        return False

    def _close(self, finding: Finding, tail: str, more: int) -> str:
        """The open match ends so far into `tail`, which begins where its deciding part ended. What is left to look at:
        with the match's last character, which the next one may look at."""
        end = min(self._offset + more, self._length)
        before = self._last if end == finding.end else tail[end - self._offset - 1]
        self.redacted = (*self.redacted, Redacted(replace(finding, end=end), end + 1))
        left = before + tail[end - self._offset :]
        self._open, self._offset = None, end - 1
        return left


def by_category(patterns: Sequence[Pattern]) -> list[PatternSet]:
    """One set for each category, so that each is found once."""
    categories = dict.fromkeys(pattern.category for pattern in patterns)
    return [PatternSet(p for p in patterns if p.category == category) for category in categories]
