"""The promise to running streams, on simulated machines whose steps take a + b * decodes + c * prompt tokens."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.pace import FRESH, Pace
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.sequence import Chunk, Outcome, Sampled
from meshlm.worker.fake import FakeSettings, expected_tokens
from meshlm.worker.messages import Submit
from tests.worker.engine.bench import GREEDY, Bench, CheckedRunner, bench, submit


@dataclass
class Machine:
    """Seconds of a step; `noise` is the most that chance adds, as a share."""

    step: float
    decode: float
    prompt_token: float
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(7)

    def seconds(self, chunks: list[Chunk]) -> float:
        decodes = sum(chunk.sample and chunk.count == 1 for chunk in chunks)
        tokens = sum(chunk.count for chunk in chunks) - decodes
        return self.exactly(decodes, tokens) * (1 + self.noise * self.random.random())

    def exactly(self, decodes: int, tokens: int) -> float:
        return self.step + self.decode * decodes + self.prompt_token * tokens


class TimedRunner(CheckedRunner):
    """Only takes its time, and always draws the same token."""

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        self.batches.append([(chunk.sequence.id, chunk.start, chunk.count) for chunk in chunks])
        self.now += self.step_seconds(chunks)
        return [Sampled(97) if chunk.sample else None for chunk in chunks]


def streaming(machine: Machine, streams: int) -> Bench:
    """So many streams, each past its prompt, that go on for long."""
    fake = FakeSettings(total_blocks=16384, max_context=8000)
    runner = TimedRunner(fake, chunk_invariant=True, step_seconds=machine.seconds)
    b = Bench(runner, SchedulerSettings(), pause=0.0)
    for i in range(streams):
        b.engine.submit(submit(f"stream{i}", [i] * 16, max_tokens=7000))
    while len(b.tokens) < streams:
        b.step()
    return b


def gaps_while(b: Bench, request: Submit) -> dict[str, list[float]]:
    """Seconds between tokens of each stream from the arrival of a request to its first token."""
    before = dict.fromkeys(b.tokens, b.now)
    counts = {name: len(tokens) for name, tokens in b.tokens.items()}
    gaps: dict[str, list[float]] = defaultdict(list)
    b.engine.submit(request)
    while request.id not in b.tokens:
        b.step()
        for name in before:
            if len(b.tokens[name]) > counts[name]:
                gaps[name].append(b.now - before[name])
                before[name], counts[name] = b.now, len(b.tokens[name])
    return gaps


machines = st.builds(
    Machine,
    step=st.floats(1e-4, 2e-2),
    decode=st.floats(1e-4, 5e-3),
    prompt_token=st.floats(1e-6, 2e-3),
    noise=st.sampled_from([0.0, 0.05]),
)


@settings(max_examples=60, deadline=None)
@given(machines, st.integers(1, 24))
def test_no_stream_stalls_for_more_than_twice_its_pace_while_a_long_prompt_comes_in(
    machine: Machine, streams: int
) -> None:
    b = streaming(machine, streams)
    for _ in range(20):
        b.step()
    began = b.now
    gaps = gaps_while(b, submit("long", [300] * 2000, max_tokens=1, arrival=began))

    plain = machine.exactly(streams, 0)
    # Four tokens always go, also where a single one takes longer than the promise allows.
    most = max(2.0 * plain, machine.exactly(streams, 4)) * (1 + machine.noise)
    for stream in gaps.values():
        late = sorted(stream)[int(0.99 * len(stream)) - 1]  # p99; of under 100 steps the largest but one
        assert late <= 1.01 * most
        first = machine.exactly(streams, 8) * (1 + machine.noise)  # nothing is known of prompt tokens before it
        assert max(stream) <= 1.01 * max(most, first)
    # The prompt gets half of the machine, less the tenth that is kept back, the steps that measure, and whole tokens.
    alone = 2000 * machine.prompt_token
    chunk = min(256.0, max(4.0, 0.9 * plain / machine.prompt_token))
    steps = 2000 / max(4, int(chunk * (1 - 2 * machine.noise)))
    assert b.now - began <= (steps * plain + alone) * 1.25 * (1 + machine.noise) + 12 * plain


def test_a_prompt_comes_in_at_full_speed_where_no_stream_runs() -> None:
    b = streaming(Machine(0.01, 0.001, 0.001), 0)
    b.engine.submit(submit("long", [300] * 2000, max_tokens=1))
    b.drain()
    assert [[count for _, _, count in batch] for batch in b.runner.batches] == [[256]] * 7 + [[208]]


def test_several_prompts_fill_a_step_where_no_stream_runs() -> None:
    b = streaming(Machine(0.01, 0.001, 0.001), 0)
    for i in range(12):
        b.engine.submit(submit(f"p{i}", [i] * 50, max_tokens=1, arrival=float(i)))
    b.step()
    assert sum(count for _, _, count in b.runner.batches[0]) == 544
    b.drain()


def test_chunks_follow_a_machine_that_becomes_slower() -> None:
    machine = Machine(0.01, 0.001, 0.0001)
    b = streaming(machine, 8)
    gaps_while(b, submit("one", [300] * 4000, max_tokens=1, arrival=1.0))
    machine.prompt_token *= 8  # such as with a longer context
    gaps = gaps_while(b, submit("two", [400] * 4000, max_tokens=1, arrival=2.0))
    slow = [gap for gap in gaps["stream0"] if gap > 2 * machine.exactly(8, 0)]
    assert len(slow) <= 1


def test_one_slow_step_neither_widens_the_promise_nor_stops_the_prompt() -> None:
    machine = Machine(0.01, 0.001, 0.0005)
    b = streaming(machine, 8)
    for _ in range(10):
        b.step()
    machine.step *= 20
    b.step()
    machine.step /= 20
    gaps = gaps_while(b, submit("long", [300] * 2000, max_tokens=1, arrival=b.now))
    assert sorted(gaps["stream0"])[-2] <= 2 * machine.exactly(8, 0)
    assert median(gaps["stream0"]) >= 1.7 * machine.exactly(8, 0)


def test_plain_steps_are_measured_again_after_a_while_of_prompts() -> None:
    pace = Pace(2.0, 4)
    for _ in range(2):
        pace.observe(8, 0, 1.0)
    waits = 0
    for _ in range(10 * FRESH):
        tokens = pace.allowance(8)
        waits += tokens == 0
        pace.observe(8, tokens, 1.0 + 0.01 * tokens)
    assert 15 <= waits <= 20  # two in each FRESH + 2 steps


def test_measurements_of_nearby_batches_do_and_of_distant_ones_do_not() -> None:
    pace = Pace(2.0, 1)
    for _ in range(2):
        pace.observe(8, 0, 1.0)
    for _ in range(9):
        tokens = pace.allowance(8)
        pace.observe(8, tokens, 1.0 + tokens / 128)
    assert pace.allowance(8) == 102  # 0.8 of a second at 1/128 of a second a token
    assert pace.allowance(10) == 102  # takes no less than 8
    assert pace.allowance(7) == 89  # 7/8 of the seconds at least
    assert pace.allowance(16) == pace.allowance(4) == 0  # to be measured first


def test_prompts_are_cut_where_the_load_allows_and_the_tokens_stay_the_same() -> None:
    machine = Machine(0.01, 0.001, 0.002)
    b = bench(total_blocks=64, chunk_invariant=True, step_seconds=machine.seconds, pause=0.0)
    for i in range(3):
        b.engine.submit(submit(f"stream{i}", [i] * 3, max_tokens=50))
    while min(len(b.tokens[f"stream{i}"]) for i in range(3)) < 5:
        b.step()
    b.engine.submit(submit("it", list(range(50)), max_tokens=3, arrival=2.0))
    b.drain()
    cuts = [start for batch in b.runner.batches for name, start, _ in batch if name == "it"]
    assert any(cut % 4 for cut in cuts[:-3])
    assert b.tokens["it"] == expected_tokens(list(range(50)), GREEDY, 3)


def test_prompts_that_arrive_together_are_computed_before_the_first_of_them_settle() -> None:
    """A burst: paced from the first token on, the last prompt would wait for dozens of small chunks."""
    machine = Machine(step=1e-2, decode=1e-3, prompt_token=1e-3)
    runner = TimedRunner(FakeSettings(total_blocks=4096), chunk_invariant=True, step_seconds=machine.seconds)
    b = Bench(runner, SchedulerSettings(chunk_tokens=64, step_tokens=96), pause=0.0)
    for i in range(8):
        b.engine.submit(submit(f"burst{i}", [i] * 48, max_tokens=40))
    while len(b.tokens) < 8:
        b.step()
    assert len(runner.batches) <= 8 * 48 // (96 - 8) + 2
