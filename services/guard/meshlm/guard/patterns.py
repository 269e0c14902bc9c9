"""Output patterns: what they are, and exactly how much of a growing text must be held back for them.

A pattern is bounded (MAX_LENGTH) and says by what character it must be followed, if by any, as something it consumes:
then it is decided by the text up to there, whatever comes later. `first_end` and `hold` rest on that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import regex

from meshlm.guard.config import Act
from meshlm.guard.findings import Finding

# Longest match of any pattern, characters, with what must follow.
MAX_LENGTH = 512
# Most of what may follow a match and is replaced with it, characters: an RSA key of 8,192 bits has 6,400.
MAX_REST = 8_192
# Never in a text (protobuf strings are UTF-8), so a pattern that ends in it is only ever matched in part.
_NEVER = "\ud800"
# Stated once for all patterns of a set: most places of a text are then out after one look.
_WORD_START = r"(?<![A-Za-z0-9])"


@dataclass(frozen=True)
class Pattern:
    """Something that an answer should not hold."""

    # e.g. `secret.github_token`.
    category: str
    # The match. It stands at the start of a word (no ASCII letter or digit before it); a further look-behind of one
    # character is fine, look-aheads are not.
    body: str
    # What must follow, as a pattern of one character; empty: nothing.
    after: str = ""
    # Confidence. Range (0, 1].
    score: float = 0.95
    # What follows, unless the policy says otherwise.
    act: Act = "block"
    # What more of it may follow: the match is as much of it as decides, and where it is replaced, all of it is.
    rest: str = ""
    # Judges the matched text, e.g. by its check digits. From one start, of all patterns with the same check, one at
    # most may match, and in one way.
    check: Callable[[str], bool] | None = None

    @property
    def source(self) -> str:
        """What is matched where it may stand."""
        return f"(?:{self.body}){self.after}"


class PatternSet:
    """Patterns that are looked for together."""

    def __init__(self, patterns: Iterable[Pattern]) -> None:
        self.patterns = tuple(patterns)
        groups: dict[Callable[[str], bool] | None, list[Pattern]] = {}
        for pattern in self.patterns:
            groups.setdefault(pattern.check, []).append(pattern)
        self._groups = [_Group(group) for group in groups.values()]
        rests = {pattern.category: pattern.rest for pattern in self.patterns}
        self._rests = {
            category: (re.compile(rest), regex.compile(f"(?:{rest}){_NEVER}")) for category, rest in rests.items()
        }

    def rest(self, category: str, text: str) -> tuple[int, bool]:
        """How much of `text`, which follows a match, belongs to it; and whether more of what comes might."""
        complete, unfinished = self._rests[category]
        grows = len(text) < MAX_REST and unfinished.match(text, partial=True) is not None
        match = complete.match(text, 0, MAX_REST)
        return match.end() if match is not None else 0, grows

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
        begin = max(begin, len(text) - MAX_LENGTH)
        return min((group.hold(text, begin) for group in self._groups), default=len(text))

    def _find(self, text: str, begin: int, end: int) -> Finding | None:
        for group in self._groups:
            finding = group.find(text, begin, end)
            if finding is not None:
                return finding
        return None


class _Group:
    """Patterns with the same check, as one expression.

    The standard library's engine finds complete matches, being the faster one; only `regex` knows partial ones. A
    single expression of all patterns is much slower in it than a few of this size.
    """

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = patterns
        sources = "|".join(f"(?:(?P<p{i}>{pattern.body}){pattern.after})" for i, pattern in enumerate(patterns))
        self._complete = re.compile(f"{_WORD_START}(?:{sources})")
        self._unfinished = regex.compile(f"{_WORD_START}(?:{'|'.join(p.source for p in patterns)}){_NEVER}")

    def find(self, text: str, begin: int, end: int) -> Finding | None:
        """The leftmost match that passes its check."""
        match = self._complete.search(text, begin, end)
        while match is not None:
            index = next(i for i in range(len(self._patterns)) if match.start(f"p{i}") >= 0)
            pattern = self._patterns[index]
            if pattern.check is None or pattern.check(match.group(f"p{index}")):
                return Finding(pattern.category, pattern.category, pattern.score, *match.span(f"p{index}"))
            match = self._complete.search(text, match.start() + 1, end)
        return None

    def hold(self, text: str, begin: int) -> int:
        match = self._unfinished.search(text, begin, partial=True)
        return match.start() if match is not None else len(text)
