"""Where a growing answer is judged by a model, and what of it the model then reads: both follow from the text alone.

How many tokens a message carries depends on the load, so messages cannot say where a window ends, or verdicts would
depend on how busy a worker is. A token is taken as `BYTES_PER_TOKEN` bytes of UTF-8: English prose has about 4.2 in
today's vocabularies, code and other scripts less, so that windows there are a little longer in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BYTES_PER_TOKEN = 4
# An answer is read whole up to here, tokens; a longer one by its beginning and its end.
_WHOLE, _FIRST, _LAST = 512, 64, 256
_GAP = "\n[...]\n"


@dataclass(frozen=True)
class View:
    """What a model reads of an answer."""

    text: str
    # Characters of the answer that it ends at.
    end: int
    # Where the part behind the gap begins in `text`, and in the answer; both 0 where there is no gap.
    resumes: int = 0
    resumes_at: int = 0

    def place(self, start: int, end: int) -> tuple[int, int]:
        """A range of `text` as one of the answer: start inclusive, end exclusive."""
        return self._place(start), max(self._place(start), self._place(end))

    def _place(self, index: int) -> int:
        index = min(index, len(self.text))
        if index >= self.resumes:
            return index - self.resumes + self.resumes_at
        return min(index, self.resumes - len(_GAP))


class Lookback:
    """The places in one growing text at which it is judged."""

    def __init__(self, windows: Sequence[int]) -> None:
        """`windows`: tokens from one place to the next; the last repeats."""
        self._windows = tuple(windows)
        self._number = 0
        self._left = self._windows[0] * BYTES_PER_TOKEN  # bytes to the next place
        self._head = ""
        self._tail = ""
        self._head_bytes = 0
        self._bytes = 0
        self.length = 0  # characters

    @property
    def next_place(self) -> int:
        """Where it is judged next, bytes."""
        return self._bytes + self._left

    def room(self, text: str) -> int:
        """Characters of `text` up to the next place, or all of them; feed no more at a time."""
        return _covering(text, self._left)

    def feed(self, text: str) -> bool:
        """Take the next characters. Whether the text is to be judged here."""
        size = len(text) if text.isascii() else len(text.encode())
        if self._head_bytes < _FIRST * BYTES_PER_TOKEN:
            more = text[: _covering(text, _FIRST * BYTES_PER_TOKEN - self._head_bytes)]
            self._head += more
            self._head_bytes += len(more.encode())
        self._tail = (self._tail + text)[-_WHOLE * BYTES_PER_TOKEN :]
        self._bytes += size
        self.length += len(text)
        self._left -= size
        if self._left > 0:
            return False
        self._number = min(self._number + 1, len(self._windows) - 1)
        self._left = self._windows[self._number] * BYTES_PER_TOKEN
        return True

    def view(self) -> View:
        """What is read here."""
        if self._bytes <= _WHOLE * BYTES_PER_TOKEN:
            return View(self._tail, self.length)
        last = self._tail.encode()[-_LAST * BYTES_PER_TOKEN :].decode(errors="ignore")
        begin = self._head + _GAP
        return View(begin + last, self.length, len(begin), self.length - len(last))


def _covering(text: str, size: int) -> int:
    """The fewest characters of `text` that have `size` bytes or more; all, if it has fewer."""
    if text.isascii():
        return min(len(text), size)
    part = text[:size].encode()  # a character has at least one
    if len(part) < size:
        return len(text)
    whole = part[:size].decode(errors="ignore")
    return len(whole) + (len(whole.encode()) < size)
