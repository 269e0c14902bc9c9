"""Which tokens are computed in the next step. Plain Python: no model, no torch, no clock of its own.

Continuous batching as in Orca (OSDI '22) and vLLM: the batch is put together anew for every step. Three questions, in
this order: who goes on (`_decodes`, then `_prefills`), who may start (`_admit`), who is done (`absorb`).

- Decodes come first and always fit, so a long prompt never stalls a stream ("chunked prefill", Sarathi-Serve).
- A prompt is computed in chunks that end at multiples of `chunk_tokens`, whatever else is in the step, so how a prompt
  is cut does not depend on the load.
- Rank is `arrival + priority * aging_seconds`: among equal priorities the earlier, and one step of priority is worth
  `aging_seconds` of waiting. Ranks never change and every later arrival ranks behind in the end, so nothing starves.
- Where blocks run out, the lowest rank is preempted: it gives up its blocks and is recomputed later. The highest rank
  is never preempted, and every accepted sequence fits alone, so each step brings some sequence nearer to its end.
"""

from __future__ import annotations

import heapq
from bisect import insort
from dataclasses import dataclass

from meshlm.worker.engine.blocks import BlockPool, extend_chain
from meshlm.worker.engine.sequence import Chunk, Sampled, Sequence, Status
from meshlm.worker.messages import Finish, Finished, Load, ModelFacts, NewToken, Started, Submit

FREED = (Finish.CANCELLED, Finish.DEADLINE)


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """How much is done at once. Raises ValueError where a full batch would leave no room for a prefill chunk."""

    # Most sequences in a step.
    max_running: int = 32
    # Most sequences not yet started; more are refused as OVERLOADED.
    max_waiting: int = 256
    # Most prompt tokens of one sequence in one step; prompts are cut at its multiples.
    chunk_tokens: int = 256
    # Most tokens in a step: decodes, then prefill chunks. At least max_running + chunk_tokens.
    step_tokens: int = 544
    # Seconds of waiting that outweigh one step of priority.
    aging_seconds: float = 10.0

    def __post_init__(self) -> None:
        if min(self.max_running, self.max_waiting, self.chunk_tokens) < 1 or self.aging_seconds < 0:
            raise ValueError("max_running, max_waiting and chunk_tokens are at least 1, aging_seconds at least 0")
        if self.step_tokens < self.max_running + self.chunk_tokens:
            raise ValueError("step_tokens is at least max_running + chunk_tokens")


class News:
    """What happened since it was last collected."""

    def __init__(self) -> None:
        self.started: list[Started] = []
        self.tokens: list[NewToken] = []
        self.finished: list[Finished] = []

    def __bool__(self) -> bool:
        return bool(self.started or self.tokens or self.finished)


class Totals:
    """Counters that only grow."""

    def __init__(self) -> None:
        self.steps = 0
        self.preemptions = 0
        self.cancelled = 0  # sequences ended by cancel or deadline
        self.freed_after_cancel = 0  # blocks that those gave up
        self.out_of_memory = 0  # sequences


class Scheduler:
    """Times (`now`) are seconds of `time.monotonic`, as in the messages."""

    def __init__(self, facts: ModelFacts, settings: SchedulerSettings) -> None:
        self.settings = settings
        self.block_size = facts.block_size
        self.pool = BlockPool(facts.total_blocks)
        self.longest = min(facts.max_context, facts.total_blocks * facts.block_size)  # tokens of one sequence
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.totals = Totals()
        self._live: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, str]] = []  # heap; ids may have ended since
        self._news = News()
        self._dropped: list[Sequence] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._live or self._news)

    def submit(self, request: Submit, now: float) -> None:
        """Takes a sequence in, or ends it at once where it can never fit or too many wait."""
        sequence = Sequence(request, request.prompt + request.generated)
        self._live[sequence.id] = sequence
        if len(sequence.tokens) >= self.longest:
            self._end(sequence, Finish.TOO_LONG, now)
        elif not request.admitted and self._unstarted() >= self.settings.max_waiting:
            self._end(sequence, Finish.OVERLOADED, now)
        else:
            self._wait(sequence)
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
        budget = self.settings.step_tokens - len(chunks)
        budget = self._prefills(chunks, budget)
        if self.totals.preemptions == preemptions:  # else the blocks just freed would be fought over
            self._admit(chunks, budget, now)
        return chunks

    def drop_newest(self, chunks: list[Chunk], now: float) -> list[Chunk]:
        """After StepOutOfMemory: ends the sequence that came last, and returns the work of the others."""
        newest = max((chunk.sequence for chunk in chunks), key=lambda sequence: sequence.request.arrival)
        self.totals.out_of_memory += 1
        self._end(newest, Finish.OUT_OF_MEMORY, now)
        return [chunk for chunk in chunks if chunk.sequence is not newest]

    def absorb(self, chunks: list[Chunk], sampled: list[Sampled | None], now: float) -> None:
        """Takes in what a step computed: new full blocks become findable, new tokens may end their sequences."""
        self.totals.steps += bool(chunks)
        for chunk, drawn in zip(chunks, sampled, strict=True):
            self._advance(chunk.sequence, chunk.start + chunk.count)
            if drawn is not None:
                self._take_token(chunk.sequence, drawn, now)

    def collect(self) -> News:
        """What happened since the last call."""
        news, self._news = self._news, News()
        return news

    def take_dropped(self) -> list[Sequence]:
        """Sequences that ran and since ended or were preempted: the runner's state of them is void."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def load(self) -> Load:
        pending = sum(sequence.uncomputed for sequence in self.waiting)
        pending += sum(sequence.uncomputed for sequence in self.running if sequence.uncomputed > 1)
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            free_blocks=self.pool.free,
            total_blocks=self.pool.total,
            pending_prefill_tokens=pending,
            cached_blocks=self.pool.cached,
            digest=self.pool.digest,
            steps_total=self.totals.steps,
            preemptions_total=self.totals.preemptions,
            cancelled_total=self.totals.cancelled,
            freed_after_cancel_total=self.totals.freed_after_cancel,
            out_of_memory_total=self.totals.out_of_memory,
        )

    def _unstarted(self) -> int:
        """Waiting sequences, less those that were preempted: these were let in before."""
        return sum(sequence.preemptions == 0 for sequence in self.waiting)

    # Who goes on?

    def _decodes(self) -> list[Chunk]:
        """One token for each sequence that has all others computed. May preempt, from the end of `running`."""
        return [
            Chunk(sequence, sequence.computed, 1, sample=True)
            for sequence in list(self.running)
            if sequence.status is Status.RUNNING and sequence.uncomputed == 1 and self._grow(sequence)
        ]

    def _prefills(self, chunks: list[Chunk], budget: int) -> int:
        """The next chunk of prompts under way, by rank, while they fit. Returns the tokens left."""
        for sequence in self.running:
            if sequence.uncomputed > 1:
                chunk = self._next_chunk(sequence)
                if chunk.count > budget:
                    return 0
                chunks.append(chunk)
                budget -= chunk.count
        return budget

    def _next_chunk(self, sequence: Sequence) -> Chunk:
        size = self.settings.chunk_tokens
        start, known = sequence.computed, len(sequence.tokens)
        end = min(start - start % size + size, known)
        return Chunk(sequence, start, end - start, sample=end == known)

    def _grow(self, sequence: Sequence) -> bool:
        """Sees to a block for the last token. False where the sequence itself had to give way."""
        while len(sequence.blocks) * self.block_size < len(sequence.tokens):
            fresh = self.pool.acquire([], 1)
            if fresh is not None:
                sequence.blocks += fresh[0]
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_up_blocks(sequence)
        sequence.preemptions += 1
        self.totals.preemptions += 1
        self._wait(sequence)

    # Who may start?

    def _admit(self, chunks: list[Chunk], budget: int, now: float) -> None:
        """Starts waiting sequences by rank, each with blocks for all its tokens. The first that does not fit ends it:
        letting smaller ones pass would starve it."""
        while self.waiting and len(self.running) < self.settings.max_running:
            sequence = self.waiting[0]
            if budget < min(self.settings.chunk_tokens, len(sequence.tokens)) or not self._start(sequence, now):
                return
            chunk = self._next_chunk(sequence)
            chunks.append(chunk)
            budget -= chunk.count

    def _start(self, sequence: Sequence, now: float) -> bool:
        known = len(sequence.tokens)
        cacheable = (known - 1) // self.block_size  # the last token is always computed: its logits are needed
        extend_chain(sequence.hashes, sequence.tokens, cacheable, self.block_size, sequence.request.cache_salt)
        table = self.pool.acquire(sequence.hashes[:cacheable], -(-known // self.block_size))
        if table is None:
            return False
        sequence.blocks, cached = table
        sequence.computed = cached * self.block_size
        sequence.status = Status.RUNNING
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=self._rank)
        if sequence.first_scheduled == 0.0:
            sequence.first_scheduled = now
            sequence.cached = sequence.computed
            self._news.started.append(Started(sequence.id, sequence.cached, now))
        return True

    def _wait(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=self._rank)

    def _rank(self, sequence: Sequence) -> tuple[float, str]:
        request = sequence.request
        return request.arrival + request.priority * self.settings.aging_seconds, request.id

    # Who is done?

    def _advance(self, sequence: Sequence, computed: int) -> None:
        first, end = sequence.computed // self.block_size, computed // self.block_size
        sequence.computed = computed
        if end > first:
            extend_chain(sequence.hashes, sequence.tokens, end, self.block_size, sequence.request.cache_salt)
            for i in range(first, end):
                self.pool.publish(sequence.blocks[i], sequence.hashes[i])

    def _take_token(self, sequence: Sequence, drawn: Sampled, now: float) -> None:
        sequence.tokens.append(drawn.token)
        if sequence.first_token == 0.0:
            sequence.first_token = now
        limits = sequence.request.limits
        if drawn.token in limits.stop_token_ids and sequence.output_length > limits.min_tokens:
            self._end(sequence, Finish.STOP_TOKEN, now, stop_token=drawn.token)
            return
        self._news.tokens.append(NewToken(sequence.id, drawn.token, drawn.logprob, drawn.top))
        if sequence.output_length >= limits.max_tokens or len(sequence.tokens) >= self.longest:
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
            self.running.remove(sequence)
            self._give_up_blocks(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.status = Status.ENDED
        del self._live[sequence.id]
        self._news.finished.append(
            Finished(
                id=sequence.id,
                reason=reason,
                stop_token=stop_token,
                cached_tokens=sequence.cached,
                arrival=sequence.request.arrival,
                first_scheduled=sequence.first_scheduled,
                first_token=sequence.first_token,
                ended=now,
                preemptions=sequence.preemptions,
            )
        )

    def _give_up_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        self._dropped.append(sequence)
