"""Judging an answer while it is made: what may go out, and what must wait for the next characters.

Text is released as soon as it can no longer become part of something that stops the answer; where a model judges too,
not before it has. The verdict depends on the text alone, not on how it was cut: a match counts from the least prefix
that has it, and a model judges at places that follow from the text.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections import deque
from collections.abc import Callable, Sequence

from meshlm.guard.content import ContentWatch, Weighed
from meshlm.guard.findings import Finding
from meshlm.guard.lookback import View
from meshlm.guard.watches import Redacted, Redactor, Watch

# A large delta is taken in steps: each step costs in proportion to the tail and to its own length.
_STEP = 512
# Windows that may wait for a model's opinion. With more, whoever sends text waits.
_OUTSTANDING = 2


class OutputCheck:
    """The check of one choice."""

    def __init__(
        self,
        blocking: Sequence[Watch],
        flagging: Sequence[Watch] = (),
        content: ContentWatch | None = None,
        redactor: Redactor | None = None,
        *,
        shadow: bool = False,
    ) -> None:
        """`blocking` stop the answer, `flagging` only tell. `shadow`: nothing is held, stopped or replaced."""
        # Those for which text is held; the redactor comes last, if there is one.
        self._holding: list[Watch] = [*blocking, *([] if redactor is None else [redactor])]
        self._redacts = redactor is not None
        self._flagging = list(flagging)
        self._content = content
        self._shadow = shadow
        self._waiting: deque[tuple[View, bool, asyncio.Task[Weighed]]] = deque()
        self._stopped: Watch | None = None
        self._failure: BaseException | None = None
        self._length = 0
        self._seen = 0  # by the watches
        self._released = 0
        self._ended = False
        self.seconds = 0.0  # spent on it, by rules and models
        # Called when an opinion was taken while nobody fed.
        self.on_change: Callable[[], None] = lambda: None

    @property
    def length(self) -> int:
        """Characters given."""
        return self._length

    @property
    def released(self) -> int:
        """Characters that may go out; never falls."""
        return self._released

    @property
    def judged(self) -> int | None:
        """Characters that a model has judged, and that stand; never falls. None where no model judges."""
        return None if self._content is None else self._content.standing

    @property
    def gather(self) -> int:
        """Bytes of the text before which no more is released than now, whatever comes; 0: not known."""
        content = self._content
        if content is None or not content.strict or self._shadow or self._ended or self._failure is not None:
            return 0
        if self.blocked is not None or self._released < content.standing:  # a pattern holds what was judged
            return 0
        return content.lookback.next_place

    @property
    def ended(self) -> bool:
        """Whether the text was said to end."""
        return self._ended

    @property
    def blocked(self) -> Finding | None:
        """What stops the answer: what is decided by the shortest text."""
        content = self._content
        if content is not None and content.found is not None:
            first = self._stopped is None or content.decided_at < self._stopped.decided_at
            return content.found if first or self._stopped is None else self._stopped.found
        return None if self._stopped is None else self._stopped.found

    @property
    def decided(self) -> bool:
        """Whether the verdict is final: the text has ended, or is stopped, and no opinion is awaited."""
        stopped = self._stopped is not None or (self._content is not None and self._content.found is not None)
        return (self._ended or (stopped and not self._shadow)) and not self._waiting

    @property
    def flagged(self) -> list[Finding]:
        """What is only told, of the text that counts."""
        found = [w.found for w in self._flagging if w.found is not None and self._counts(w.decided_at)]
        if self._content is not None and self._content.flagged is not None:
            found.append(self._content.flagged)
        return found

    @property
    def redacted(self) -> list[Redacted]:
        """What is replaced, in order, of the text that counts."""
        redactor = self._holding[-1] if self._redacts else None
        if not isinstance(redactor, Redactor):
            return []
        return [redacted for redacted in redactor.redacted if self._counts(redacted.decided_at)]

    @property
    def detectors(self) -> tuple[str, ...]:
        """The models that judged."""
        return self._content.detectors if self._content is not None else ()

    async def feed(self, text: str, *, last: bool = False) -> None:
        """Take the text that follows; with `last`, the answer ends. Returns once at most `_OUTSTANDING` windows wait.

        Raises MeshError GUARD_UNAVAILABLE.
        """
        at = 0
        self._length += len(text)
        while at < len(text) and self.blocked is None:
            step = text[at : at + _STEP]
            if self._content is not None:
                step = step[: self._content.lookback.room(step)]
            self._look(step)
            if self._content is not None and self._stopped is None and self._content.lookback.feed(step):
                await self._judge(last=False)
            at += len(step)
            if at < len(text):
                await asyncio.sleep(0)  # a long text is no reason for other streams to wait
        if last and not self._ended:
            if self.blocked is None:
                self._look("", last=True)
            if self.blocked is None and self._content is not None:
                await self._judge(last=True)
            self._ended = True
        self._release()
        self.raise_failure()

    async def settle(self) -> None:
        """Wait for all opinions that are awaited. Raises MeshError GUARD_UNAVAILABLE."""
        while self._waiting:
            await self._next_opinion()
        self.raise_failure()

    @property
    def failed(self) -> bool:
        """Whether a model could not judge, and the policy refuses then."""
        return self._failure is not None

    def raise_failure(self) -> None:
        """Raises MeshError GUARD_UNAVAILABLE if it failed."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Nobody needs the rest: opinions still awaited are cancelled."""
        for *_, task in self._waiting:
            task.cancel()
        self._waiting.clear()

    def _counts(self, decided_at: int) -> bool:
        """Whether what is decided there comes before what a model stops: watches may be ahead of it."""
        content = self._content
        return content is None or content.found is None or decided_at <= content.decided_at

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
        task = asyncio.ensure_future(self._timed(content, view))
        self._waiting.append((view, last, task))
        task.add_done_callback(self._arrived)
        await asyncio.sleep(0)  # a model in this process has judged by then
        self._collect()
        while len(self._waiting) > _OUTSTANDING:
            await self._next_opinion()

    async def _timed(self, content: ContentWatch, view: View) -> Weighed:
        begun = time.perf_counter()
        try:
            return await content.weigh(view)
        finally:
            self.seconds += time.perf_counter() - begun

    async def _next_opinion(self) -> None:
        """Wait for the oldest opinion that is awaited, and take it."""
        await asyncio.wait([self._waiting[0][2]])
        self._collect()

    def _arrived(self, task: asyncio.Task[Weighed]) -> None:
        if task.cancelled():
            return
        task.exception()  # taken in its turn, or nobody's any more
        if self._collect():
            self.on_change()

    def _collect(self) -> bool:
        """Take the opinions that are there, in order. Whether there were any."""
        content, taken = self._content, False
        while content is not None and self._waiting and self._waiting[0][2].done():
            view, last, task = self._waiting.popleft()
            taken = True
            if (failure := task.exception()) is not None:
                self._failure = self._failure or failure
                self.close()
                break
            content.take(view, task.result(), last=last)
            if content.found is not None:
                self.close()
        self._release()
        return taken

    def _release(self) -> None:
        if self._shadow:
            clear = self._length
        elif self._failure is not None:
            return
        elif self.blocked is None and self._ended and not self._waiting:
            clear = self._length
        else:
            clear = min([self._seen, *(watch.clear for watch in self._holding)])
            if self._content is not None:
                clear = self._content.clear(clear)
        self._released = max(self._released, clear)

    def _look(self, text: str, *, last: bool = False) -> None:
        """Let the watches see the next characters, up to where the first of them finds something."""
        begun = time.perf_counter()
        before = [copy.copy(watch) for watch in self._holding]
        found = [index for index, watch in enumerate(self._holding) if watch.feed(text, last=last)]
        if found:
            chosen = min(found, key=lambda index: self._holding[index].decided_at)
            self._stopped = self._holding[chosen]
            # What comes after the end of an answer is not judged, or verdicts would depend on the last delta's size.
            end = max(0, self._stopped.decided_at - self._seen)
            last = last and end > len(text)
            text = text[:end]
            before[chosen] = self._stopped
            for index, watch in enumerate(before):
                if index != chosen:
                    watch.feed(text, last=last)
            self._holding = before
        self._seen += len(text)
        for watch in self._flagging:
            watch.feed(text, last=last)
        self.seconds += time.perf_counter() - begun
