"""A runner that is a step ahead of the scheduler: the same tokens as one that is not, whatever happens meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.flight import Flight, Row
from meshlm.worker.engine.gpu_runner import GpuRunner
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.sequence import Chunk, Outcome, Sampled, Sequence
from meshlm.worker.fake import FakeRunner, FakeSettings, expected_tokens, next_token
from meshlm.worker.messages import Finish, Sampling, Submit
from tests.worker.engine.bench import SMALL, Bench, CheckedRunner, submit

END_ONE_IN = 12


class FakeReply:
    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def wait(self, draws: int) -> tuple[list[int], list[float]]:
        assert draws == len(self._tokens)
        return self._tokens, [0.0] * draws


class FakeSampler:
    def is_careful(self, sequence: Sequence, output_index: int) -> bool:
        return bool(sequence.request.sampling.logit_bias)

    def forget(self, sequence: Sequence) -> None:
        """It has no state."""


@dataclass
class FakeSteps:
    """The device: what it stores and draws depends on what lies in its memory, block by block, as a cache's does."""

    fake: FakeRunner
    drawn: list[int] = field(default_factory=list)
    log: list[list[tuple[str, int]]] = field(default_factory=list)  # of decode steps
    sampler: FakeSampler = field(default_factory=FakeSampler)

    def decode(self, rows: list[Row]) -> Flight:
        self.log.append([(row.sequence.id, row.position) for row in rows])
        for row in rows:
            token = row.sequence.tokens[row.position] if row.source < 0 else self.drawn[row.source]
            self.fake._store(row.sequence, row.position, token)
        self.drawn = [self._next(row.sequence, row.position) for row in rows]
        return Flight(rows, FakeReply(self.drawn), [row.sequence.blocks for row in rows])  # type: ignore[arg-type]

    def mixed(self, chunks: list[Chunk]) -> Flight:
        outcomes = FakeRunner.run(self.fake, chunks)
        self.drawn = [outcome.token for outcome in outcomes if isinstance(outcome, Sampled)]
        rows = [Row(chunk.sequence, chunk.start + chunk.count - 1) for chunk in chunks if chunk.sample]
        return Flight(rows, FakeReply(self.drawn), [row.sequence.blocks for row in rows])  # type: ignore[arg-type]

    def _next(self, sequence: Sequence, position: int) -> int:
        context = self.fake._read(sequence, position + 1)
        return next_token(context, sequence.request.sampling, END_ONE_IN)


class FakeAhead(FakeRunner):
    """The runner of a GPU over a fake device."""

    def __init__(self, fake: FakeSettings) -> None:
        super().__init__(fake)
        self.facts = msgspec.structs.replace(self.facts, looks_ahead=True, kv_budgets=False)
        self.steps = FakeSteps(self)
        self.ahead = GpuRunner(self.steps, self.facts)  # type: ignore[arg-type]

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        return self.ahead.run(chunks)


@dataclass
class CheckedAhead(CheckedRunner, FakeAhead):
    """Lawful requests in, and the runner of a GPU behind them."""


def ahead(total_blocks: int = 16, scheduling: SchedulerSettings = SMALL, **options: object) -> Bench:
    fake = FakeSettings(total_blocks=total_blocks, block_size=4, max_context=64, end_one_in=END_ONE_IN)
    return Bench(CheckedAhead(fake, **options), scheduling)  # type: ignore[arg-type]


def steps_of(b: Bench) -> FakeSteps:
    assert isinstance(b.runner, CheckedAhead)
    return b.runner.steps


def test_each_step_is_launched_before_the_tokens_of_the_one_before_are_known() -> None:
    b = ahead()
    b.engine.submit(submit("it", [1, 2, 3], max_tokens=5))
    b.step()  # the prompt: its token will be at position 3, which is computed already
    assert steps_of(b).log == [[("it", 3)]]
    b.step()
    assert steps_of(b).log == [[("it", 3)], [("it", 4)]]
    b.drain()
    assert [len(step) for step in steps_of(b).log] == [1] * 4  # and nothing beyond the fifth token


def test_a_new_prompt_is_computed_behind_what_was_launched_for_the_others() -> None:
    b = ahead()
    b.engine.submit(submit("first", [1, 2, 3], max_tokens=9))
    b.step()
    b.engine.submit(submit("second", [7] * 5, max_tokens=3))
    b.step()
    assert b.runner.batches[-1] == [("first", 3, 1), ("second", 0, 5)]
    assert steps_of(b).log == [[("first", 3)]]  # not computed again
    b.drain()
    for name, prompt in (("first", [1, 2, 3]), ("second", [7] * 5)):
        assert b.tokens[name] == expected_tokens(prompt, Sampling(temperature=0), len(b.tokens[name]), END_ONE_IN)


def test_what_draws_with_a_history_is_not_guessed() -> None:
    b = ahead()
    biased = Sampling(temperature=0, logit_bias={1: 2.0})
    b.engine.submit(submit("it", [1, 2, 3], max_tokens=5, sampling=biased))
    b.drain()
    assert len(steps_of(b).log) == 4  # one for each token behind the first, none in vain


def test_what_was_computed_into_a_block_table_that_was_given_up_does_not_count() -> None:
    """A preempted sequence may start again at the very position that was computed ahead, in other blocks."""
    runner = FakeAhead(FakeSettings(total_blocks=8, block_size=4, max_context=64, end_one_in=END_ONE_IN))
    request = submit("it", [1, 2, 3], max_tokens=9)
    sequence = Sequence(request, [1, 2, 3], blocks=[0, 1])
    [drawn] = runner.run([Chunk(sequence, 0, 3, True)])
    assert isinstance(drawn, Sampled)
    assert runner.steps.log == [[("it", 3)]]
    sequence.tokens.append(drawn.token)
    sequence.blocks = [2, 3]
    for index, token in enumerate(request.prompt):
        runner._store(sequence, index, token)
    [second] = runner.run([Chunk(sequence, 3, 1, True)])
    assert isinstance(second, Sampled)
    assert runner.steps.log[:2] == [[("it", 3)], [("it", 3)]]
    assert [drawn.token, second.token] == expected_tokens(request.prompt, request.sampling, 2, END_ONE_IN)


submits = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=24),
    st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 12),
            "priority": st.integers(-1, 1),
            "stop_token_ids": st.just((256,)),
        }
    ),
)
actions = st.lists(st.one_of(submits, st.integers(0, 8), st.just("step"), st.just("step")), max_size=30)


@settings(deadline=None)
@given(actions, st.integers(4, 24), st.sets(st.integers(1, 60), max_size=4))
def test_whatever_happens_meanwhile_the_tokens_are_right_and_nothing_leaks(
    script: list[object], total_blocks: int, fail_at: set[int]
) -> None:
    b = ahead(total_blocks, fail_at=fail_at)
    sent: dict[str, Submit] = {}
    for action in script:
        if action == "step":
            b.step()
        elif isinstance(action, int):
            b.engine.cancel(f"s{action}")
        else:
            prompt, fields = action  # type: ignore[misc]
            request = submit(f"s{len(sent)}", prompt, **fields)
            sent[request.id] = request
            b.engine.submit(request)
    b.drain()
    assert b.engine.blocks_in_use == 0
    assert b.finished.keys() == sent.keys()
    for name, request in sent.items():
        got = b.tokens[name]
        assert got == expected_tokens(request.prompt, request.sampling, len(got), END_ONE_IN)
        if b.finished[name].reason is Finish.LENGTH:
            assert len(got) == min(request.limits.max_tokens, min(64, 4 * total_blocks) - len(request.prompt))
