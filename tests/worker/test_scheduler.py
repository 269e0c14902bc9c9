from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.fake import BROKEN, END, expected_tokens
from meshlm.worker.messages import Finish, Sampling, Submit
from tests.worker.engine.bench import GREEDY, SMALL, bench, submit


def test_a_long_prompt_does_not_stall_a_running_stream() -> None:
    b = bench()
    b.engine.submit(submit("stream", [1, 2, 3], max_tokens=12))
    b.step()
    b.engine.submit(submit("long", list(range(30)), max_tokens=1))
    for _ in range(4):  # 30 tokens in chunks of 8
        b.step()
        assert b.runner.batches[-1][0][0] == "stream"
    assert len(b.tokens["stream"]) == 5
    assert b.finished["long"].reason is Finish.LENGTH


def test_prompts_are_cut_at_the_same_places_alone_and_under_load() -> None:
    def cuts(load: int) -> list[tuple[int, int]]:
        b = bench(total_blocks=64)
        for i in range(load):
            b.engine.submit(submit(f"other{i}", [100 + i] * 5, max_tokens=9))
        b.engine.submit(submit("it", list(range(21)), arrival=0.5))
        b.drain()
        return [(start, count) for batch in b.runner.batches for name, start, count in batch if name == "it"][:3]

    assert cuts(0) == cuts(6) == [(0, 8), (8, 8), (16, 5)]


def test_a_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    b = bench()
    prompt = list(range(12))
    b.engine.submit(submit("first", prompt))
    b.drain()
    b.runner.batches.clear()
    b.engine.submit(submit("second", prompt))
    b.drain()
    assert b.runner.batches[0] == [("second", 8, 4)]  # 12 tokens are 3 blocks, of which 2 leave a token to compute
    assert b.finished["second"].cached_tokens == 8
    assert b.tokens["first"] == b.tokens["second"]


def test_another_salt_does_not_see_the_cached_prefix() -> None:
    b = bench()
    b.engine.submit(submit("mine", list(range(12)), cache_salt=b"a"))
    b.drain()
    b.engine.submit(submit("theirs", list(range(12)), cache_salt=b"b"))
    b.drain()
    assert b.finished["theirs"].cached_tokens == 0


def test_smaller_priority_and_then_arrival_start_first() -> None:
    b = bench(scheduling=SchedulerSettings(max_running=1, max_waiting=8, chunk_tokens=8, step_tokens=20))
    for name, priority, arrival in [("late", 0, 2.0), ("early", 0, 1.0), ("batch", 1, 0.0), ("critical", -1, 3.0)]:
        b.engine.submit(submit(name, [1, 2], max_tokens=1, priority=priority, arrival=arrival))
    b.drain()
    assert b.started == ["critical", "early", "late", "batch"]


def test_waiting_outweighs_priority_so_that_nothing_starves() -> None:
    b = bench(scheduling=SchedulerSettings(max_running=1, max_waiting=100, chunk_tokens=8, step_tokens=20))
    b.engine.submit(submit("batch", [1, 2], max_tokens=1, priority=2, arrival=1.0))
    for i in range(41):  # each second two urgent requests come, and one can be served
        for twin in "ab":
            b.engine.submit(submit(f"urgent{i}{twin}", [1, 2], max_tokens=1, arrival=b.now))
        b.step()
    # Two steps of priority are 20 seconds: the 2 * 20 that came in that time may pass, and none that came later.
    assert b.started.index("batch") == 40


def test_a_full_queue_refuses_and_what_can_never_fit_is_told_at_once() -> None:
    b = bench(total_blocks=4)  # 16 tokens
    for i in range(8):
        b.engine.submit(submit(f"w{i}", [1]))
    b.engine.submit(submit("ninth", [1]))
    b.engine.submit(submit("long", [1] * 16))
    b.step()
    assert b.finished["ninth"].reason is Finish.OVERLOADED
    assert b.finished["long"].reason is Finish.TOO_LONG
    b.drain()
    assert {b.finished[f"w{i}"].reason for i in range(8)} == {Finish.LENGTH}


def test_a_sequence_ends_where_the_memory_ends() -> None:
    b = bench(total_blocks=4)
    b.engine.submit(submit("it", [1] * 10, max_tokens=50))
    b.drain()
    assert b.finished["it"].reason is Finish.LENGTH
    assert len(b.tokens["it"]) == 6  # 4 blocks of 4 hold 16 tokens


def test_cancel_frees_blocks_before_the_next_step() -> None:
    b = bench()
    b.engine.submit(submit("it", [1] * 9, max_tokens=50))
    b.step()
    assert b.engine.blocks_in_use == 3
    b.engine.cancel("it")
    assert b.engine.blocks_in_use == 0
    b.engine.cancel("it")  # crossed on the way: no error
    b.step()
    assert b.finished["it"].reason is Finish.CANCELLED
    load = b.scheduler.load()
    assert (load.cancelled_total, load.freed_after_cancel_total) == (1, 3)
    assert b.runner.forgotten == ["it"]


def test_a_passed_deadline_ends_running_and_waiting_alike() -> None:
    b = bench(scheduling=SchedulerSettings(max_running=1, max_waiting=8, chunk_tokens=8, step_tokens=20))
    b.engine.submit(submit("runs", [1, 2], max_tokens=50, deadline=4.5))
    b.engine.submit(submit("waits", [1, 2], max_tokens=50, deadline=4.5))
    b.drain()
    assert {end.reason for end in b.finished.values()} == {Finish.DEADLINE}
    assert len(b.tokens["runs"]) == 3  # steps at 2, 3 and 4
    assert b.engine.blocks_in_use == 0


def test_the_newest_is_preempted_and_says_the_same_afterwards() -> None:
    b = bench(total_blocks=6)  # 24 tokens, and two sequences of 16
    for name, arrival in [("old", 1.0), ("new", 2.0)]:
        b.engine.submit(submit(name, [3] * 6 if name == "old" else [4] * 6, max_tokens=10, arrival=arrival))
    b.drain()
    assert b.finished["old"].preemptions == 0
    assert b.finished["new"].preemptions == 1
    assert b.tokens["new"] == expected_tokens([4] * 6, GREEDY, 10)
    assert b.scheduler.load().preemptions_total == 1


def test_preempted_sequences_take_no_place_in_the_queue_from_new_ones() -> None:
    b = bench(6, SchedulerSettings(max_running=2, max_waiting=1, chunk_tokens=8, step_tokens=20))
    b.engine.submit(submit("old", [3] * 8, max_tokens=12, arrival=1.0))
    b.step()
    b.engine.submit(submit("preempted", [4] * 8, max_tokens=12, arrival=2.0))
    while not b.scheduler.totals.preemptions:
        b.step()
    assert [sequence.id for sequence in b.scheduler.waiting] == ["preempted"]
    b.engine.submit(submit("new", [5], arrival=3.0))
    b.engine.submit(submit("refused", [5], arrival=3.0))
    b.drain()
    assert b.finished["refused"].reason is Finish.OVERLOADED
    assert [b.finished[name].reason for name in ("old", "preempted", "new")] == [Finish.LENGTH] * 3


def test_a_full_queue_does_not_refuse_what_was_let_in_with_an_earlier_sequence() -> None:
    b = bench(scheduling=SchedulerSettings(max_running=1, max_waiting=1, chunk_tokens=8, step_tokens=20))
    for name, admitted in [("first", False), ("second_choice", True), ("refused", False)]:
        b.engine.submit(submit(name, [1], admitted=admitted))
    b.drain()
    assert b.finished["refused"].reason is Finish.OVERLOADED
    assert b.finished["second_choice"].reason is Finish.LENGTH


def test_out_of_memory_ends_the_newest_and_the_others_go_on() -> None:
    b = bench(fail_at={2})
    for name, arrival in [("old", 1.0), ("newest", 3.0), ("middle", 2.0)]:
        b.engine.submit(submit(name, [1, 2, 3], max_tokens=5, arrival=arrival))
    b.drain()
    assert b.finished["newest"].reason is Finish.OUT_OF_MEMORY
    assert len(b.tokens["old"]) == len(b.tokens["middle"]) == 5
    assert b.scheduler.load().out_of_memory_total == 1


def test_out_of_memory_for_a_single_sequence_does_not_end_the_engine() -> None:
    b = bench(fail_at={1})
    b.engine.submit(submit("first", [1, 2]))
    b.step()
    assert b.finished["first"].reason is Finish.OUT_OF_MEMORY
    b.engine.submit(submit("second", [1, 2]))
    b.drain()
    assert b.finished["second"].reason is Finish.LENGTH


def test_no_numbers_end_a_sequence_and_what_it_computed_is_not_found_again() -> None:
    b = bench()
    broken = list(BROKEN) * 3  # more than a block of the fake
    b.engine.submit(submit("broken", broken, max_tokens=8))
    b.engine.submit(submit("sound", [1, 2, 3], max_tokens=8))
    b.drain()
    assert b.finished["broken"].reason is Finish.NON_FINITE
    assert b.tokens["broken"] == expected_tokens(broken, GREEDY, 3)  # what was drawn before is told
    assert b.finished["sound"].reason is Finish.LENGTH
    assert b.scheduler.load().non_finite_total == 1
    b.engine.submit(submit("again", broken, max_tokens=3))
    b.drain()
    assert b.finished["again"].cached_tokens == 0


def test_stop_token_is_told_in_the_end_and_not_as_text() -> None:
    drawn = expected_tokens([7, 8], GREEDY, 6)
    stop = drawn[3]
    first = drawn.index(stop)
    b = bench()
    b.engine.submit(submit("it", [7, 8], max_tokens=6, stop_token_ids=frozenset([stop])))
    b.drain()
    assert b.tokens["it"] == drawn[:first]
    assert (b.finished["it"].reason, b.finished["it"].stop_token) == (Finish.STOP_TOKEN, stop)


def test_output_made_elsewhere_is_continued_and_counts_as_output() -> None:
    drawn = expected_tokens([7, 8], GREEDY, 6)
    b = bench()
    b.engine.submit(submit("it", [7, 8], max_tokens=6, generated=drawn[:4]))
    b.drain()
    assert b.tokens["it"] == drawn[4:]


@pytest.mark.parametrize("wrong", [{"stall_ratio": 1.0}, {"least_chunk_tokens": 0}, {"aging_seconds": -1.0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SchedulerSettings(**wrong)  # type: ignore[arg-type]


def test_a_step_too_small_for_a_batch_and_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="step_tokens"):
        SchedulerSettings(max_running=8, chunk_tokens=8, step_tokens=15)


requests = st.builds(
    lambda shared, tail, n, priority, arrival, salt, seed, deadline, stops, tenant: (
        [65] * shared + tail,
        {
            "max_tokens": n,
            "priority": priority,
            "arrival": arrival,
            "cache_salt": salt,
            "sampling": Sampling(seed=seed),
            "deadline": deadline,
            "stop_token_ids": frozenset([END]) if stops else frozenset(),
            "tenant": tenant,
        },
    ),
    shared=st.integers(0, 20),
    tail=st.lists(st.integers(0, 255), min_size=1, max_size=25),
    n=st.integers(1, 30),
    priority=st.integers(-2, 2),
    arrival=st.floats(0, 50),
    salt=st.sampled_from([b"", b"a"]),
    seed=st.integers(0, 2),
    deadline=st.one_of(st.none(), st.none(), st.floats(2, 60)),
    stops=st.booleans(),
    tenant=st.sampled_from(["", "a", "b"]),
)
actions = st.lists(
    st.one_of(requests, requests, st.integers(0, 30), st.just("step"), st.just("step"), st.just("step")), max_size=80
)


@settings(max_examples=200, deadline=None)
@given(actions, st.integers(4, 24), st.sets(st.integers(1, 60), max_size=4), st.booleans())
def test_whatever_arrives_all_ends_nothing_leaks_and_the_tokens_are_right(
    script: list[object], total_blocks: int, fail_at: set[int], chunk_invariant: bool
) -> None:
    b = bench(total_blocks=total_blocks, fail_at=fail_at, end_one_in=12, chunk_invariant=chunk_invariant)
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
        in_use = {block for sequence in b.scheduler.running for block in sequence.blocks}
        assert b.engine.blocks_in_use == len(in_use)
        assert not any(sequence.blocks for sequence in b.scheduler.waiting)
    b.drain()

    assert b.engine.blocks_in_use == 0
    assert b.finished.keys() == sent.keys()
    reasons = [end.reason for end in b.finished.values()]
    load = b.scheduler.load()
    assert load.cancelled_total == reasons.count(Finish.CANCELLED) + reasons.count(Finish.DEADLINE)
    assert load.out_of_memory_total == reasons.count(Finish.OUT_OF_MEMORY)
    assert load.preemptions_total == sum(end.preemptions for end in b.finished.values())
    assert load.steps_total == len(b.runner.batches)
    assert (load.running, load.waiting, load.pending_prefill_tokens) == (0, 0, 0)
    assert all(max(start + count for _, start, count in batch) <= 64 for batch in b.runner.batches)
    assert all(sum(count for _, _, count in batch) <= SMALL.step_tokens for batch in b.runner.batches)
    for name, request in sent.items():
        got = b.tokens[name]
        assert got == expected_tokens(request.prompt, request.sampling, len(got), end_one_in=12)
        if b.finished[name].reason is Finish.LENGTH:
            room = min(64, 4 * total_blocks) - len(request.prompt)
            assert len(got) == min(request.limits.max_tokens, room)
