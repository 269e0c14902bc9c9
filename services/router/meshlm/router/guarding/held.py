"""One choice of an answer on its way: what is held of it, what the guard was told, and what it said."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.guarding.redaction import Redactions
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, inference_pb2

Moderation = inference_pb2.Moderation


class HeldChoice:
    """Positions and sizes are characters of the choice's text as the worker sent it, where nothing else is said."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.blocked = False
        self.sent = 0  # went out
        self.judged = 0
        self.ahead = False  # the guard tells how far it judged: text may go out before that
        self.verdict: pb.Verdict | None = None
        self._chunks: deque[tuple[pb.Chunk, int]] = deque()  # with where its text begins
        self._chars = 0  # received
        self._bytes = 0  # the same
        self._ended = False  # its last chunk was received
        self._gathered: list[str] = []  # what the guard was not told yet
        self._gathered_tokens = 0
        self._gather_bytes = 0  # before which the guard lets no more out, whatever it is told
        self._told = 0  # to the guard
        self._untaken: deque[tuple[int, int]] = deque()  # end of a text that it was told and did not take; its tokens
        self._taken = 0  # by the guard
        self._released = 0
        self._final = False
        self._redactions = Redactions()
        self._next_token = 0  # offset after the last token that went out
        self._checked = 0  # the last check_offset told

    @property
    def owed(self) -> bool:
        """Whether the guard has something to say yet."""
        return not self.blocked and not self._final and (self._taken < self._told or self._ended)

    @property
    def untaken_tokens(self) -> int:
        """Tokens that the guard was told and has not taken."""
        return sum(tokens for _, tokens in self._untaken)

    @property
    def all_taken(self) -> bool:
        """Whether the guard took all it was told."""
        return not self._untaken

    @property
    def untold(self) -> bool:
        """Whether text is here that the guard was not told."""
        return bool(self._gathered) and not self.blocked

    def add(self, chunk: pb.Chunk, skipped: str) -> None:
        """Hold the worker's next chunk; `skipped` is text before it that went out in another stream."""
        self._chunks.append((chunk, self._chars + len(skipped)))
        if skipped:
            self.sent = len(skipped)
        text = skipped + chunk.text
        self._chars += len(text)
        self._bytes += len(text) if text.isascii() else len(text.encode())
        self._ended = chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    def gather(self, chunk: pb.Chunk, skipped: str, at_most: int) -> bool:
        """Whether the guard is to be told now: it would let more out, or `at_most` tokens have gathered."""
        self._gathered.append(skipped + chunk.text)
        self._gathered_tokens += chunk.token_count
        return self._ended or self._bytes >= self._gather_bytes or self._gathered_tokens >= at_most

    def telling(self) -> guard_pb2.CheckOutputRequest:
        """What the guard was not told yet."""
        message = guard_pb2.OutputText(choice=self.choice, text="".join(self._gathered), last=self._ended)
        self._untaken.append((self._chars, self._gathered_tokens))
        self._told = self._chars
        self._gathered.clear()
        self._gathered_tokens = 0
        return guard_pb2.CheckOutputRequest(text=message)

    def accept(self, response: guard_pb2.CheckOutputResponse) -> None:
        """Take what the guard says. Raises MeshError GUARD_UNAVAILABLE if it cannot be true."""
        self.ahead = response.HasField("judged_chars")
        judged = response.judged_chars if self.ahead else self.judged
        for before, now in ((self._released, response.released_chars), (self._taken, response.taken_chars)):
            if not before <= now <= self._chars:
                raise nonsense()
        if not self.judged <= judged <= self._chars:
            raise nonsense()
        for found in response.redactions:
            if not max(self._redactions.end, self._released) <= found.char_start < found.char_end <= self._chars:
                raise nonsense()
            self._redactions.add(found)
        self._released, self._taken = response.released_chars, response.taken_chars
        self._gather_bytes = response.gather_bytes
        self._final = self._final or response.final
        self.verdict = response.verdict
        while self._untaken and (self._final or self._untaken[0][0] <= self._taken):
            self._untaken.popleft()

    def let_out(self, response: guard_pb2.CheckOutputResponse) -> Iterator[pb.Chunk | Moderation]:
        """What may go out by the guard's word, which was accepted."""
        if self.blocked:
            return
        yield from self.pop()
        if response.HasField("judged_chars") and response.judged_chars > self.judged:
            passed = self._moderation(Moderation.ACTION_PASS, self.judged, response.judged_chars)
            self.judged = response.judged_chars
            yield passed
        if response.verdict.action == pb.Verdict.ACTION_BLOCK:
            self.blocked = True
            self._untaken.clear()
            yield self._end(response.verdict)
            yield self._stopped()

    def pop(self) -> Iterator[pb.Chunk]:
        """Chunks whose text is released; the last one, once the verdict is final."""
        while self._chunks:
            chunk, start = self._chunks[0]
            last = chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED
            if start + len(chunk.text) > self._released or (last and not self._final):
                return
            self._chunks.popleft()
            self.sent = start + len(chunk.text)
            self._next_token = chunk.token_offset + chunk.token_count
            yield self._redactions.rewrite(chunk, start)

    def pop_all(self) -> Iterator[pb.Chunk]:
        """All that is held: nobody judges any more, and that lets an answer pass."""
        if not self.blocked:
            self._released, self._final = self._chars, True
            yield from self.pop()

    def drop(self) -> None:
        """Nothing more of it goes out."""
        self._chunks.clear()

    def placed_verdict(self) -> pb.Verdict:
        """The guard's verdict, with offsets into the text that went out."""
        verdict = pb.Verdict()
        verdict.CopyFrom(self.verdict or verdict)
        verdict.char_start = self._redactions.place(verdict.char_start)
        verdict.char_end = self._redactions.place(verdict.char_end)
        return verdict

    def _end(self, verdict: pb.Verdict) -> Moderation:
        """What is said where it is stopped: to take back what was sent and never passed, or that nothing was."""
        start, end = verdict.char_start, verdict.char_end
        if self.sent > max(start, self.judged):
            return self._moderation(Moderation.ACTION_RETRACT, max(start, self.judged), self.sent)
        return self._moderation(Moderation.ACTION_STOP, start, end)

    def _stopped(self) -> pb.Chunk:
        offset = self._chunks[0][0].token_offset if self._chunks else self._next_token
        self._chunks.clear()
        return pb.Chunk(choice=self.choice, token_offset=offset, finish_reason=pb.FINISH_REASON_CONTENT_FILTER)

    def _moderation(self, action: Moderation.Action.ValueType, start: int, end: int) -> Moderation:
        verdict, place = self.verdict, self._redactions.place
        if verdict is not None and action == Moderation.ACTION_PASS and verdict.action == pb.Verdict.ACTION_BLOCK:
            verdict = None  # what it says is of the text behind
        self._checked = max(self._checked, place(end))
        return Moderation(
            choice=self.choice,
            check_offset=self._checked,
            char_start=place(start),
            char_end=place(end),
            categories=verdict.categories if verdict is not None else (),
            score=verdict.score if verdict is not None else 0.0,
            action=action,
        )


def nonsense() -> MeshError:
    """What the guard says cannot be true."""
    return MeshError(Reason.GUARD_UNAVAILABLE, "the guard's answers contradict each other")
