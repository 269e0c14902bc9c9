"""Judging an answer while it is made: what may go out, and what must wait for the next characters.

Text is released as soon as it can no longer become part of something that stops the answer; where a model judges too,
not before it has. The verdict depends on the text alone, not on how it was cut: a match counts from the least prefix
that has it, and a model judges at places that follow from the text.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

from meshlm.guard.findings import Finding
from meshlm.guard.lookback import Lookback, View
from meshlm.guard.patterns import Pattern, PatternSet

# A large delta is taken in steps: each step costs in proportion to the tail and to its own length.
_STEP = 512
# Stands for the end of the text: it ends every word and number.
_END = "\n"
# Windows that may wait for a model's opinion. With more, whoever sends text waits.
_OUTSTANDING = 2


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
        self._strict = strict
        self._doubt: Finding | None = None  # of the last window, if it was soft
        self.found: Finding | None = None
        self.decided_at = 0
        self.flagged: Finding | None = None
        self.flagged_at = 0
        self.judged = 0  # characters
        self.detectors: tuple[str, ...] = ()
        self._cleared = 0  # characters judged that are not in doubt

    def clear(self, length: int) -> int:
        """Characters that this watch lets go, of `length`."""
        if self.found is not None:
            return min(length, self._cleared)
        return self._cleared if self._strict else length

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
            self._cleared = view.end

    def end(self) -> None:
        """The answer ends where the last window did: nothing more can dispel a doubt."""
        if self._doubt is not None:
            self._stop(self._doubt)

    def _stop(self, finding: Finding | None) -> None:
        self.found, self.decided_at = finding, self.judged
        if self.flagged_at >= self.judged:
            self.flagged = None


_W = TypeVar("_W", bound=Watch)


class OutputCheck:
    """The check of one choice."""

    def __init__(
        self, blocking: Sequence[Watch], flagging: Sequence[Watch] = (), content: ContentWatch | None = None
    ) -> None:
        """`blocking` stop the answer, `flagging` only tell."""
        self._blocking = list(blocking)
        self._flagging = list(flagging)
        self._content = content
        self._waiting: deque[tuple[View, bool, asyncio.Task[Weighed]]] = deque()
        self._stopped: Watch | None = None
        self._length = 0
        self._seen = 0  # by the watches
        self._released = 0
        self._ended = False

    @property
    def length(self) -> int:
        """Characters given."""
        return self._length

    @property
    def released(self) -> int:
        """Characters that may go out; never falls."""
        return self._released

    @property
    def judged(self) -> int:
        """Characters that all have judged, models too; never falls."""
        return self._seen_text if self._content is None else min(self._seen_text, self._content.judged)

    @property
    def ended(self) -> bool:
        """Whether the text was said to end."""
        return self._ended

    @property
    def blocked(self) -> Finding | None:
        """What stops the answer: what is decided by the shortest text."""
        content = self._content.found if self._content is not None else None
        if self._stopped is None or (content is not None and self._content_first()):
            return content
        return self._stopped.found

    @property
    def decided(self) -> bool:
        """Whether the verdict is final: the text has ended, or is stopped, and no opinion is awaited."""
        if self._content is not None and self._content.found is not None:
            return True
        return (self._ended or self._stopped is not None) and not self._waiting

    @property
    def flagged(self) -> list[Finding]:
        """What is only told, of the text that counts."""
        end = self._content.decided_at if self._content is not None and self._content.found is not None else None
        found = [w.found for w in self._flagging if w.found is not None and (end is None or w.decided_at <= end)]
        if self._content is not None and self._content.flagged is not None:
            found.append(self._content.flagged)
        return found

    @property
    def detectors(self) -> tuple[str, ...]:
        """The models that judged."""
        return self._content.detectors if self._content is not None else ()

    async def feed(self, text: str, *, last: bool = False) -> None:
        """Take the text that follows; with `last`, the answer ends. Returns once at most `_OUTSTANDING` windows wait.

        Raises MeshError GUARD_UNAVAILABLE.
        """
        at = 0
        while at < len(text) and self.blocked is None:
            step = min(_STEP, len(text) - at)
            if self._content is not None:
                step = self._content.lookback.room(text[at : at + step])
            self._look(text[at : at + step])
            if (
                self._content is not None
                and self._stopped is None
                and self._content.lookback.feed(text[at : at + step])
            ):
                await self._judge(last=False)
            at += step
            if at < len(text):
                await asyncio.sleep(0)  # a long text is no reason for other streams to wait
        self._length += len(text)
        if last and not self._ended:
            self._ended = True
            if self.blocked is None:
                self._look("", last=True)
            if self.blocked is None and self._content is not None:
                await self._judge(last=True)
        self._release()

    async def settle(self) -> None:
        """Wait for all opinions that are awaited. Raises MeshError GUARD_UNAVAILABLE."""
        while self._waiting:
            await self.next_opinion()

    async def next_opinion(self) -> None:
        """Wait for the oldest opinion that is awaited, and take it. Raises MeshError GUARD_UNAVAILABLE."""
        await asyncio.wait([self._waiting[0][2]])
        self._collect()

    def close(self) -> None:
        """Nobody needs the rest: opinions still awaited are cancelled."""
        for *_, task in self._waiting:
            if not task.cancel() and not task.cancelled():
                task.exception()  # it failed, and need not be told
        self._waiting.clear()

    @property
    def _seen_text(self) -> int:
        return min(self._seen, self._length)

    def _content_first(self) -> bool:
        return (
            self._content is not None
            and self._stopped is not None
            and self._content.decided_at < self._stopped.decided_at
        )

    async def _judge(self, *, last: bool) -> None:
        """Ask for an opinion of the text so far; wait while too many are awaited."""
        content = self._content
        assert content is not None  # noqa: S101
        if last and content.lookback.length == (self._waiting[-1][0].end if self._waiting else content.judged):
            # The last window ended just here.
            if self._waiting:
                view, _, task = self._waiting[-1]
                self._waiting[-1] = (view, True, task)
            else:
                content.end()
            return
        view = content.lookback.view()
        self._waiting.append((view, last, asyncio.ensure_future(content.weigh(view))))
        await asyncio.sleep(0)  # a model in this process has judged by then
        self._collect()
        while len(self._waiting) > _OUTSTANDING:
            await self.next_opinion()

    def _collect(self) -> None:
        """Take the opinions that are there, in order."""
        content = self._content
        while content is not None and self._waiting and self._waiting[0][2].done():
            view, last, task = self._waiting.popleft()
            content.take(view, task.result(), last=last)
            if content.found is not None:
                self.close()
        self._release()

    def _release(self) -> None:
        if self.blocked is None and self._ended and not self._waiting:
            clear = self._length
        else:
            clear = min((watch.clear for watch in self._blocking), default=self._seen_text)
            clear = min(clear, self._seen_text)
            if self._content is not None:
                clear = self._content.clear(clear)
        self._released = max(self._released, clear)

    def _look(self, text: str, *, last: bool = False) -> None:
        """Let the watches see the next characters, up to where the first of them finds something."""
        before = [copy.copy(watch) for watch in self._blocking]
        found = [watch for watch in self._blocking if watch.feed(text, last=last)]
        if found:
            self._stopped = min(found, key=lambda watch: watch.decided_at)
            # What comes after the end of an answer is not judged, or verdicts would depend on the last delta's size.
            end = max(0, self._stopped.decided_at - self._seen)
            last = last and end > len(text)
            text = text[:end]
            chosen = self._blocking.index(self._stopped)
            self._blocking = [w if i == chosen else _fed(before[i], text, last) for i, w in enumerate(self._blocking)]
        self._seen += len(text)
        for watch in self._flagging:
            watch.feed(text, last=last)


def _fed(watch: _W, text: str, last: bool) -> _W:
    watch.feed(text, last=last)
    return watch


def by_category(patterns: Sequence[Pattern]) -> list[PatternSet]:
    """One set for each category, so that each is found once."""
    categories = dict.fromkeys(pattern.category for pattern in patterns)
    return [PatternSet(p for p in patterns if p.category == category) for category in categories]
