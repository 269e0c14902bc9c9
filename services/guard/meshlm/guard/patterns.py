"""Output patterns: what they are, and exactly how much of a growing text must be held back for them.

A pattern is bounded (MAX_LENGTH) and says by what character it must be followed, if by any, as something it consumes:
then it is decided by the text up to there, whatever comes later. `first_end` and `hold` rest on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import regex

from meshlm.guard.config import Act
from meshlm.guard.findings import Finding

# Longest match of any pattern, characters, with what must follow.
MAX_LENGTH = 512
# Never in a text (protobuf strings are UTF-8), so a pattern that ends in it is only ever matched in part.
_NEVER = "\ud800"


@dataclass(frozen=True)
class Pattern:
    """Something that an answer should not hold."""

    # e.g. `secret.github_token`.
    category: str
    # The match; look-behinds of one character are fine, look-aheads are not.
    body: str
    # What must follow, as a pattern of one character; empty: nothing.
    after: str = ""
    # Confidence. Range (0, 1].
    score: float = 0.95
    # What follows, unless the policy says otherwise.
    act: Act = "block"
    # Judges the matched text, e.g. by its check digits. From one start, `source` must then match one text at most.
    check: Callable[[str], bool] | None = None

    @property
    def source(self) -> str:
        return f"(?:{self.body}){self.after}"


class PatternSet:
    """Patterns that are looked for together."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self.patterns = tuple(patterns)
        # Of patterns with a check, those of one family exclude each other from one start; so one look finds them all.
        groups: dict[str, list[Pattern]] = {}
        for pattern in self.patterns:
            groups.setdefault(pattern.category.partition(".")[0] if pattern.check else "", []).append(pattern)
        self._groups = [_Group(group) for group in groups.values()]
        sources = "|".join(pattern.source for pattern in self.patterns)
        self._unfinished = regex.compile(f"(?:{sources}){_NEVER}") if self.patterns else None

    def first(self, text: str, begin: int, known: int) -> tuple[Finding, int] | None:
        """The finding that is decided first, and where: the least end at which some pattern is matched.

        Matches start at `begin` or later; `text[:known]` is known to have none. What is found does not depend on how
        the text arrived.
        """
        if self._find(text, begin, len(text)) is None:
            return None
        # Whether text[:end] has a match can only change from no to yes as `end` grows.
        low, high = known, len(text)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._find(text, begin, middle) is None else (low, middle)
        finding = self._find(text, begin, high)
        return None if finding is None else (finding, high)

    def hold(self, text: str, begin: int) -> int:
        """Least index from which `text` could still grow into a match; its length if there is none."""
        if self._unfinished is None:
            return len(text)
        match = self._unfinished.search(text, max(begin, len(text) - MAX_LENGTH), partial=True)
        return match.start() if match is not None else len(text)

    def _find(self, text: str, begin: int, end: int) -> Finding | None:
        for group in self._groups:
            finding = group.find(text, begin, end)
            if finding is not None:
                return finding
        return None


class _Group:
    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = patterns
        sources = (f"(?:(?P<p{i}>{pattern.body}){pattern.after})" for i, pattern in enumerate(patterns))
        self._compiled = regex.compile("|".join(sources))

    def find(self, text: str, begin: int, end: int) -> Finding | None:
        """The leftmost match that passes its check."""
        for match in self._compiled.finditer(text, begin, end, overlapped=True):
            index = next(i for i in range(len(self._patterns)) if match.start(f"p{i}") >= 0)
            pattern = self._patterns[index]
            if pattern.check is None or pattern.check(match.group(f"p{index}")):
                return Finding(pattern.category, pattern.category, pattern.score, *match.span(f"p{index}"))
        return None
