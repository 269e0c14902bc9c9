"""An engine over a checked fake runner, with a clock that stands still unless it is moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from meshlm.worker.engine.engine import Engine
from meshlm.worker.engine.scheduler import Scheduler, SchedulerSettings
from meshlm.worker.engine.sequence import Chunk, Outcome, Sequence, Status, StepOutOfMemory
from meshlm.worker.fake import FakeRunner, FakeSettings
from meshlm.worker.messages import Embedded, Finished, Limits, Sampling, Scored, Submit

GREEDY = Sampling(temperature=0)
SMALL = SchedulerSettings(max_running=4, max_waiting=8, chunk_tokens=8, step_tokens=20)


def submit(name: str, prompt: list[int], max_tokens: int = 4, **fields: object) -> Submit:
    limits = {key: fields.pop(key) for key in ("deadline", "stop_token_ids", "min_tokens") if key in fields}
    fields.setdefault("sampling", GREEDY)
    return Submit(id=name, prompt=prompt, limits=Limits(max_tokens=max_tokens, **limits), **fields)  # type: ignore[arg-type]


@dataclass
class CheckedRunner(FakeRunner):
    """A fake runner that sees to it that what it is asked to do is lawful."""

    fake: FakeSettings
    fail_at: set[int] = field(default_factory=set)
    calls: int = 0
    batches: list[list[tuple[str, int, int]]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    chunk_invariant: bool = False
    now: float = 1.0  # the clock, which a step moves by `step_seconds`
    step_seconds: Callable[[list[Chunk]], float] = lambda chunks: 0.0

    def __post_init__(self) -> None:
        super().__init__(self.fake)
        self.facts = msgspec.structs.replace(self.facts, chunk_invariant=self.chunk_invariant)

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        self.calls += 1
        if self.calls in self.fail_at:
            raise StepOutOfMemory
        self.batches.append([(chunk.sequence.id, chunk.start, chunk.count) for chunk in chunks])
        written: set[int] = set()
        for chunk in chunks:
            sequence, size = chunk.sequence, self.facts.block_size
            assert sequence.status is Status.RUNNING
            assert chunk.start == sequence.computed
            assert chunk.count > 0
            generates = sequence.request.score_from is None and sequence.request.pool is None
            assert chunk.sample == (generates and chunk.start + chunk.count == len(sequence.tokens))
            first = chunk.start - sequence.evicted
            own = set(sequence.blocks[first // size : (first + chunk.count - 1) // size + 1])
            assert not own & written, "two writers"
            written |= own
        readers: dict[int, set[object]] = defaultdict(set)
        for chunk in chunks:
            sequence, size = chunk.sequence, self.facts.block_size
            for i, block in enumerate(sequence.blocks):
                prefix = (sequence.request.cache_salt, tuple(sequence.tokens[: (i + 1) * size]))
                readers[block].add(prefix if sequence.request.kv is None else sequence.id)
        assert all(len(prefixes) == 1 for prefixes in readers.values()), "shared among unequal prefixes"
        self.now += self.step_seconds(chunks)
        return super().run(chunks)

    def compact(self, sequence: Sequence, keep: int) -> None:
        assert sequence.status is Status.RUNNING
        assert sequence.request.kv is not None
        assert 0 < keep <= sequence.request.kv.tokens
        assert keep < sequence.computed - sequence.evicted
        assert len(sequence.blocks) * self.facts.block_size >= sequence.computed - sequence.evicted
        super().compact(sequence, keep)

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence.id)


@dataclass
class Bench:
    """An engine whose clock stands still unless moved, and what came out of it."""

    runner: CheckedRunner
    scheduling: SchedulerSettings = SMALL
    pause: float = 1.0  # seconds between steps
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[str, Finished] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    scored: dict[str, Scored] = field(default_factory=dict)
    embedded: dict[str, Embedded] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = Engine(self.runner, self.scheduling, clock=lambda: self.runner.now)

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    @property
    def now(self) -> float:
        return self.runner.now

    def step(self) -> None:
        self.runner.now += self.pause
        report = self.engine.step()
        self.started += [event.id for event in report.started]
        for token in report.tokens:
            assert token.id not in self.finished
            self.tokens[token.id].append(token.token)
        for answers, told in ((self.scored, report.scored), (self.embedded, report.embedded)):
            for answer in told:
                assert answer.id not in answers
                answers[answer.id] = answer  # type: ignore[index]
        for end in report.finished:
            assert end.id not in self.finished, "ended twice"
            self.finished[end.id] = end

    def drain(self, bound: int = 2000) -> None:
        for _ in range(bound):
            if not self.engine.busy:
                return
            self.step()
        raise AssertionError(f"still busy after {bound} steps")


def bench(
    total_blocks: int = 16,
    scheduling: SchedulerSettings = SMALL,
    *,
    pause: float = 1.0,
    end_one_in: int = 0,
    block_size: int = 4,
    max_context: int = 64,
    **options: object,
) -> Bench:
    """The options are those of CheckedRunner."""
    fake = FakeSettings(
        total_blocks=total_blocks, block_size=block_size, max_context=max_context, end_one_in=end_one_in
    )
    return Bench(CheckedRunner(fake, **options), scheduling, pause)  # type: ignore[arg-type]
