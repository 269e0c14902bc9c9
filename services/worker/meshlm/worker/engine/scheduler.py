"""Which tokens are computed in the next step. Plain Python: no model, no torch, no clock of its own.

Continuous batching as in Orca (OSDI '22) and vLLM: the batch is put together anew for every step. Three questions, in
this order: who goes on (`_decodes`, then `_prefills`), who may start (`_admit`), who is done (`absorb`).

- Decodes come first and always fit; prompts are computed in chunks beside them ("chunked prefill", Sarathi-Serve), so
  that running streams keep their pace (`chunking.py`, `pace.py`).
- Who starts first, and why nobody starves: `waiting.py`; what a tenant has had: `fairness.py`.
- What is cached is not computed again (`blocks.py`), and what is being computed not a second time (`underway.py`); who
  holds which blocks: `tables.py`.
- Where blocks run out, sequences are preempted: they give up their blocks and are recomputed later. It hits the tenant
  that was served most, and of its sequences the lowest rank. The highest rank of all that run is never preempted, and
  every accepted sequence fits alone, so each step brings some sequence nearer to its end; and a sequence than which
  none has a higher rank runs to its end once it has started.
- Sequences with a KV budget let go of blocks between steps (`budgets.py`).
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass

from meshlm.worker.engine.blocks import BlockPool
from meshlm.worker.engine.budgets import Budgets
from meshlm.worker.engine.chunking import Chunking, Room, generates
from meshlm.worker.engine.fairness import Shares
from meshlm.worker.engine.news import Answers, News, Totals, finished, is_broken
from meshlm.worker.engine.pace import Pace
from meshlm.worker.engine.sequence import Chunk, ChunkPool, ChunkScores, Outcome, Sampled, Sequence, Status
from meshlm.worker.engine.tables import Tables
from meshlm.worker.engine.waiting import WaitingQueue
from meshlm.worker.messages import Finish, Load, ModelFacts, NewToken, Started, Submit

FREED = (Finish.CANCELLED, Finish.DEADLINE)


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """How much is done at once. Raises ValueError where a full batch would leave no room for a prefill chunk."""

    # Most sequences in a step.
    max_running: int = 32
    # Most sequences not yet started; more are refused as OVERLOADED.
    max_waiting: int = 256
    # Most prompt tokens of one sequence in one step. Where the load may not change the cuts, they are at its multiples.
    chunk_tokens: int = 256
    # Most tokens in a step: decodes, then prefill chunks. At least max_running + chunk_tokens.
    step_tokens: int = 544
    # Seconds of waiting that outweigh one step of priority.
    aging_seconds: float = 10.0
    # Most that prompts may lengthen a step of running streams: it takes so many times one without. Above 1.
    stall_ratio: float = 2.0
    # Prompt tokens that join a step even where they break that promise, so that a prompt always gets on.
    least_chunk_tokens: int = 4

    def __post_init__(self) -> None:
        if min(self.max_running, self.max_waiting, self.chunk_tokens, self.least_chunk_tokens) < 1:
            raise ValueError("max_running, max_waiting, chunk_tokens and least_chunk_tokens are at least 1")
        if self.aging_seconds < 0 or self.stall_ratio <= 1:
            raise ValueError("aging_seconds is at least 0, and stall_ratio above 1")
        if self.step_tokens < self.max_running + self.chunk_tokens:
            raise ValueError("step_tokens is at least max_running + chunk_tokens")


class Scheduler:
    """Times (`now`) are seconds of `time.monotonic`, as in the messages."""

    def __init__(self, facts: ModelFacts, settings: SchedulerSettings) -> None:
        self.settings = settings
        self.shares = Shares()
        self.waiting = WaitingQueue(self._rank, self.shares)
        self.running: list[Sequence] = []  # by rank
        self.totals = Totals()
        budgets = Budgets(facts.block_size, settings.chunk_tokens)
        self._tables = Tables(facts, budgets)
        pace = Pace(settings.stall_ratio, settings.least_chunk_tokens) if facts.chunk_invariant else None
        self._chunking = Chunking(budgets, pace, settings.chunk_tokens, settings.step_tokens)
        self._live: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, str]] = []  # heap; ids may have ended since
        self._news = News()
        self._answers = Answers()
        self._dropped: list[Sequence] = []

    @property
    def pool(self) -> BlockPool:
        return self._tables.pool

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._live or self._news)

    def submit(self, request: Submit, now: float) -> None:
        """Takes a sequence in, or ends it at once where it can never fit or too many wait."""
        sequence = Sequence(request, request.prompt + request.generated)
        if not self._tables.possible(sequence):
            self._news.finished.append(finished(sequence, Finish.TOO_LONG, now))
        elif not request.admitted and not self._has_place(request.tenant, now):
            self._news.finished.append(finished(sequence, Finish.OVERLOADED, now))
        else:
            self._live[sequence.id] = sequence
            self.waiting.add(sequence)
            if request.limits.deadline is not None:
                heapq.heappush(self._deadlines, (request.limits.deadline, sequence.id))

    def cancel(self, sequence_id: str, now: float) -> None:
        """Ends a sequence and frees its blocks. An id that has ended already is no error: the two crossed."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._end(sequence, Finish.CANCELLED, now)

    def cancel_all(self, now: float) -> None:
        for sequence_id in list(self._live):
            self.cancel(sequence_id, now)

    def schedule(self, now: float) -> list[Chunk]:
        """The work of the next step: at most one chunk a sequence."""
        self._expire(now)
        preemptions = self.totals.preemptions
        chunks = self._decodes()
        room = self._chunking.room(chunks)
        self._prefills(chunks, room)
        if self.totals.preemptions == preemptions:  # else the blocks just freed would be fought over
            self._admit(chunks, room, now)
        return chunks

    def drop_newest(self, chunks: list[Chunk], now: float) -> list[Chunk]:
        """After StepOutOfMemory: ends the sequence that came last, and returns the work of the others."""
        newest = max((chunk.sequence for chunk in chunks), key=lambda sequence: sequence.request.arrival)
        self.totals.out_of_memory += 1
        self._end(newest, Finish.OUT_OF_MEMORY, now)
        return [chunk for chunk in chunks if chunk.sequence is not newest]

    def absorb(self, chunks: list[Chunk], outcomes: list[Outcome], now: float, seconds: float) -> None:
        """Takes in what a step of so many seconds computed: new full blocks become findable, new tokens may end their
        sequences, budgets are kept. Sequences whose numbers are broken end, and nobody finds their blocks."""
        self.totals.steps += bool(chunks)
        self._chunking.observe(chunks, seconds)
        for chunk, outcome in zip(chunks, outcomes, strict=True):
            sequence = chunk.sequence
            self._tables.advance(sequence, chunk.start + chunk.count)
            if is_broken(outcome):
                self.totals.non_finite += 1
                self._tables.distrust(sequence)
                self._end(sequence, Finish.NON_FINITE, now)
                continue
            if isinstance(outcome, Sampled):
                self._take_token(sequence, outcome, now)
            elif isinstance(outcome, ChunkScores | ChunkPool):
                self._answers.add(sequence, outcome)
            if not generates(sequence) and sequence.uncomputed == 0:
                self._answers.tell(sequence, self._news)
                self._end(sequence, Finish.DONE, now)
            elif sequence.request.kv is not None and sequence.status is Status.RUNNING:
                self._tables.keep_budget(sequence, sequence.request.kv)

    def take_compactions(self) -> list[tuple[Sequence, int]]:
        """Sequences that are over their budget, and how many of their cached tokens each is to keep. The runner is
        to choose and move those (`Runner.compact`), and then `compacted` to be called for each."""
        return self._tables.take_compactions()

    def compacted(self, sequence: Sequence, keep: int) -> None:
        self._tables.compacted(sequence, keep)

    def collect(self) -> News:
        """What happened since the last call."""
        news, self._news = self._news, News()
        return news

    def take_dropped(self) -> list[Sequence]:
        """Sequences that ran and since ended or were preempted: the runner's state of them is void."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def load(self) -> Load:
        prefills = sum(sequence.uncomputed for sequence in self.running if sequence.uncomputed > 1)
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            free_blocks=self.pool.free,
            total_blocks=self.pool.total,
            pending_prefill_tokens=self.waiting.tokens + prefills,
            cached_blocks=self.pool.cached,
            digest=self.pool.digest,
            steps_total=self.totals.steps,
            preemptions_total=self.totals.preemptions,
            cancelled_total=self.totals.cancelled,
            freed_after_cancel_total=self.totals.freed_after_cancel,
            out_of_memory_total=self.totals.out_of_memory,
            non_finite_total=self.totals.non_finite,
        )

    def _has_place(self, tenant: str, now: float) -> bool:
        """Whether the queue takes another one; it may cost a tenant with more places one of them."""
        if self.waiting.unstarted < self.settings.max_waiting:
            return True
        displaced = self.waiting.to_displace(tenant)
        if displaced is not None:
            self._end(displaced, Finish.OVERLOADED, now)
        return displaced is not None

    # Who goes on?

    def _decodes(self) -> list[Chunk]:
        """One token for each sequence that has all others computed. May preempt, also those that had a place."""
        going = [
            sequence
            for sequence in list(self.running)
            if sequence.status is Status.RUNNING and sequence.uncomputed == 1 and self._grow(sequence)
        ]
        return [
            Chunk(sequence, sequence.computed, 1, sample=generates(sequence))
            for sequence in going
            if sequence.status is Status.RUNNING
        ]

    def _prefills(self, chunks: list[Chunk], room: Room) -> None:
        """The next chunk of prompts under way, by rank, while they fit."""
        for sequence in self.running:
            if sequence.uncomputed > 1:
                chunk = self._chunking.next(sequence, room)
                if chunk is None:
                    return
                chunks.append(chunk)

    def _grow(self, sequence: Sequence) -> bool:
        """Sees to a block for the last token. False where the sequence itself had to give way."""
        while not self._tables.grow(sequence):
            # The first is spared. It is never alone here: every sequence fits alone.
            victim = max(
                self.running[1:], key=lambda other: (self.shares.served(other.request.tenant), self._rank(other))
            )
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        self.totals.preemptions += 1
        self.waiting.add(sequence)

    # Who may start?

    def _admit(self, chunks: list[Chunk], room: Room, now: float) -> None:
        """Starts waiting sequences, each with blocks for all its tokens. The first that does not fit ends it: letting
        smaller ones pass would starve it."""
        while self.waiting and len(self.running) < self.settings.max_running and room.prompt > 0:
            sequence = self.waiting.first(self._tables.ready)
            if sequence is None or not self._chunking.fits(sequence, room) or not self._start(sequence, now):
                return
            chunk = self._chunking.next(sequence, room)
            if chunk is not None:  # always: it fits
                chunks.append(chunk)

    def _start(self, sequence: Sequence, now: float) -> bool:
        if not self._tables.open(sequence):
            self.waiting.keep_turn(sequence)
            return False
        self.waiting.remove(sequence)
        self.waiting.end_turn()
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=self._rank)
        self.shares.start(sequence.request.tenant, sequence.uncomputed if sequence.preemptions == 0 else 0)
        if sequence.first_scheduled == 0.0:
            sequence.first_scheduled = now
            sequence.cached = sequence.computed
            self._news.started.append(Started(sequence.id, sequence.cached, now))
        return True

    def _rank(self, sequence: Sequence) -> tuple[float, str]:
        request = sequence.request
        return request.arrival + request.priority * self.settings.aging_seconds, request.id

    # Who is done?

    def _take_token(self, sequence: Sequence, drawn: Sampled, now: float) -> None:
        sequence.tokens.append(drawn.token)
        self.shares.draw(sequence.request.tenant)
        if sequence.first_token == 0.0:
            sequence.first_token = now
        limits = sequence.request.limits
        if drawn.token in limits.stop_token_ids and sequence.output_length > limits.min_tokens:
            self._end(sequence, Finish.STOP_TOKEN, now, stop_token=drawn.token)
            return
        self._news.tokens.append(NewToken(sequence.id, drawn.token, drawn.logprob, drawn.top))
        if sequence.output_length >= limits.max_tokens or len(sequence.tokens) >= self._tables.longest(sequence):
            self._end(sequence, Finish.LENGTH, now)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = self._live.get(heapq.heappop(self._deadlines)[1])
            if sequence is not None and (sequence.request.limits.deadline or now) <= now:
                self._end(sequence, Finish.DEADLINE, now)

    def _end(self, sequence: Sequence, reason: Finish, now: float, stop_token: int | None = None) -> None:
        if reason in FREED:
            self.totals.cancelled += 1
            self.totals.freed_after_cancel += len(sequence.blocks)
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
            self._tables.close(sequence)
        sequence.status = Status.ENDED
        del self._live[sequence.id]
        self._news.finished.append(finished(sequence, reason, now, stop_token))

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._tables.close(sequence)
        self._answers.drop(sequence)
        self._dropped.append(sequence)
