"""Ends a stream of text at the first stop string, without ever letting a part of one out."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """One stream's. What is given out does not depend on how the text was cut into pieces.

    The stop string that is complete first wins; of several complete at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What can safely be given out now. After a match, always empty."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return held[:at]
        keep = self._unsafe(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The end of the stream without a match: what was held back. Call once."""
        held, self._held = self._held, ""
        return held

    def _unsafe(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._stops) - 1)
        for length in range(longest, 0, -1):
            suffix = text[len(text) - length :]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0
