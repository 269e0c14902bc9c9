"""What a model's opinions of an answer's windows come to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from meshlm.guard.findings import Finding
from meshlm.guard.lookback import Lookback, View


@dataclass(frozen=True)
class Weighed:
    """What a policy makes of a model's opinion of a window."""

    # `hard`: stop at once. `soft`: stop if the next window says so too, or if the answer ends here. `flag`: tell.
    grade: Literal["clean", "flag", "soft", "hard"] = "clean"
    # What is wrong, with characters of the view. Set unless `clean`.
    finding: Finding | None = None
    # Who judged.
    detectors: tuple[str, ...] = ()


# Weighs one view of the answer. Raises MeshError GUARD_UNAVAILABLE where no model can and the policy refuses then.
Weigh = Callable[[View], Awaitable[Weighed]]


class ContentWatch:
    """What a model's opinions of an answer's windows come to, taken in the order of the windows."""

    def __init__(self, weigh: Weigh, windows: Sequence[int], *, strict: bool) -> None:
        """`windows`: see `Lookback`. `strict`: hold what is not judged, and what is in doubt."""
        self.weigh = weigh
        self.lookback = Lookback(windows)
        self.strict = strict
        self._doubt: Finding | None = None  # of the last window, if it was soft
        self.found: Finding | None = None
        self.decided_at = 0
        self.flagged: Finding | None = None
        self.flagged_at = 0
        self.judged = 0  # characters
        self.detectors: tuple[str, ...] = ()
        self.standing = 0  # characters judged that are not in doubt, nor what stops the answer

    def clear(self, length: int) -> int:
        """Characters that this watch lets go, of `length`."""
        return min(length, self.standing) if self.strict or self.found is not None else length

    def take(self, view: View, weighed: Weighed, *, last: bool) -> None:
        """The opinion of the next window; `last`: the answer ends with it."""
        self.judged = view.end
        self.detectors = weighed.detectors or self.detectors
        finding = weighed.finding
        if finding is not None:
            start, end = view.place(finding.start, finding.end)
            finding = replace(finding, start=start, end=end)
        if weighed.grade == "hard" or (weighed.grade == "soft" and (last or self._doubt is not None)):
            self._stop(finding)
            return
        if finding is not None and self.flagged is None:
            self.flagged, self.flagged_at = finding, view.end
        self._doubt = finding if weighed.grade == "soft" else None
        if self._doubt is None:
            self.standing = view.end

    def end(self) -> None:
        """The answer ends where the last window did: nothing more can dispel a doubt."""
        if self._doubt is not None:
            self._stop(self._doubt)

    def _stop(self, finding: Finding | None) -> None:
        self.found, self.decided_at = finding, self.judged
        if self.flagged_at >= self.judged:
            self.flagged = None
