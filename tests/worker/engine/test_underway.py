"""A prefix that many ask for at once is computed once."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.fake import expected_tokens
from meshlm.worker.messages import Finish
from tests.worker.engine.bench import GREEDY, Bench, bench, submit

WIDE = SchedulerSettings(max_running=16, max_waiting=64, chunk_tokens=16, step_tokens=64)


def computed(b: Bench) -> int:
    return sum(count for batch in b.runner.batches for _, _, count in batch)


def test_a_prefix_that_sixteen_share_is_computed_once() -> None:
    scheduling = SchedulerSettings(max_running=16, chunk_tokens=128, step_tokens=544)
    b = bench(total_blocks=256, scheduling=scheduling, block_size=16, max_context=1024, chunk_invariant=True)
    prefix = [i % 251 for i in range(512)]
    for i in range(16):
        b.engine.submit(submit(f"s{i:02}", [*prefix, 1000 + i] * 1, max_tokens=1, arrival=1.0))
    b.drain()
    assert computed(b) == 512 + 16
    assert sorted(end.cached_tokens for end in b.finished.values()) == [0] + [512] * 15


def test_who_does_not_share_the_prefix_passes_those_that_wait_for_it() -> None:
    b = bench(total_blocks=64, scheduling=WIDE)
    for name in ("first", "second"):
        b.engine.submit(submit(name, [7] * 40, max_tokens=1, arrival=1.0))
    b.engine.submit(submit("other", [8] * 4, max_tokens=1, arrival=2.0))
    b.step()
    assert b.started == ["first", "other"]
    b.drain()
    assert b.finished["second"].cached_tokens == 36


def test_the_next_goes_on_by_itself_where_the_computing_one_is_cancelled() -> None:
    b = bench(total_blocks=64, scheduling=WIDE)
    for i in range(3):
        b.engine.submit(submit(f"s{i}", [7] * 40, max_tokens=1, arrival=1.0 + i))
    b.step()
    b.engine.cancel("s0")
    b.step()
    assert b.started == ["s0", "s1"]
    b.drain()
    assert b.finished["s1"].cached_tokens == 16  # what the first had done
    assert b.finished["s2"].cached_tokens == 36


def test_another_salt_waits_for_nobody() -> None:
    b = bench(total_blocks=64, scheduling=WIDE)
    for salt in (b"a", b"b"):
        b.engine.submit(submit(salt.decode(), [7] * 40, max_tokens=1, cache_salt=salt, arrival=1.0))
    b.step()
    assert b.started == ["a", "b"]
    b.drain()


def test_the_second_of_two_shared_parts_is_computed_once_too() -> None:
    b = bench(total_blocks=128, scheduling=WIDE)
    tails = [[1] * 12, [2] * 12]
    for i in range(6):
        prompt = [7] * 32 + tails[i % 2] + [10 + i]
        b.engine.submit(submit(f"s{i}", prompt, max_tokens=1, arrival=1.0 + i))
    b.drain()
    assert computed(b) == 32 + 2 * 12 + 6


arrivals = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(0, 3), st.integers(1, 8)),
        st.integers(0, 20),
        st.just("step"),
        st.just("step"),
    ),
    max_size=50,
)


@settings(max_examples=100, deadline=None)
@given(arrivals, st.integers(11, 30), st.sets(st.integers(1, 40), max_size=3))
def test_waiting_for_a_prefix_never_locks_up_whatever_becomes_of_who_computes_it(
    script: list[object], total_blocks: int, fail_at: set[int]
) -> None:
    b = bench(total_blocks=total_blocks, fail_at=fail_at)
    prompts: dict[str, list[int]] = {}
    for action in script:
        if action == "step":
            b.step()
        elif isinstance(action, int):
            b.engine.cancel(f"s{action}")
        else:
            family, shared, tail, answer = action  # type: ignore[misc]
            name = f"s{len(prompts)}"
            prompts[name] = [family // 2] * shared + [family] * tail
            b.engine.submit(submit(name, prompts[name], answer, tenant=str(family % 2), arrival=b.now))
    b.drain(bound=600)
    assert b.finished.keys() == prompts.keys()
    assert not b.scheduler._tables._underway._claims
    assert not b.scheduler._tables._underway._awaited
    assert b.engine.blocks_in_use == 0
    reasons = Counter(end.reason for end in b.finished.values())
    assert set(reasons) <= {Finish.LENGTH, Finish.CANCELLED, Finish.OUT_OF_MEMORY, Finish.OVERLOADED}
    for name, got in b.tokens.items():
        assert got == expected_tokens(prompts[name], GREEDY, len(got))
