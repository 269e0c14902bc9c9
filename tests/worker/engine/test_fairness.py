"""Who starts next, among tenants and priorities. Expected bounds are those of the paper on virtual token counters."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.fairness import FORGET_FROM, INPUT_WEIGHT, OUTPUT_WEIGHT, Shares
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.messages import Finish
from tests.worker.engine.bench import Bench, bench, submit

ONE_BY_ONE = SchedulerSettings(max_running=1, max_waiting=1000, chunk_tokens=64, step_tokens=80)
FOUR = SchedulerSettings(max_running=4, max_waiting=1000, chunk_tokens=64, step_tokens=80)


def flood(b: Bench, tenant: str, count: int, tokens: int = 4, **fields: object) -> None:
    """So many requests at once, each with a prompt of its own, and `tokens` of prompt and of answer."""
    for i in range(count):
        prompt = [ord(tenant[0]), i % 250, i // 250, *[0] * (tokens - 3)]
        b.engine.submit(submit(f"{tenant}{i:03}", prompt, max_tokens=tokens, tenant=tenant, arrival=b.now, **fields))


def test_a_flood_of_one_tenant_does_not_keep_another_waiting() -> None:
    b = bench(scheduling=ONE_BY_ONE)
    flood(b, "flood", 50)
    b.step()
    flood(b, "other", 1)
    b.drain()
    # One of the flood ran when it came, and one more may start: both tenants then stand equal, and it is older.
    assert b.started.index("other000") <= 2


def test_tenants_that_always_have_work_take_turns_by_what_they_cost() -> None:
    b = bench(scheduling=ONE_BY_ONE)
    flood(b, "small", 40, tokens=4)
    flood(b, "large", 40, tokens=12)
    while len(b.finished) < 40:
        b.step()
    small, large = (sum(name.startswith(tenant) for name in b.finished) for tenant in ("small", "large"))
    assert small == 3 * large  # a large one costs three times as much


def test_a_tenant_that_was_idle_gets_no_credit_for_it() -> None:
    b = bench(scheduling=ONE_BY_ONE)
    flood(b, "busy", 30)
    for _ in range(60):  # 15 of them
        b.step()
    flood(b, "idle", 30)
    before = len(b.started)
    for _ in range(80):
        b.step()
    later = b.started[before:]
    assert abs(sum(name.startswith("idle") for name in later) - len(later) / 2) <= 1


def test_what_is_cached_costs_a_tenant_nothing() -> None:
    b = bench(total_blocks=64, scheduling=ONE_BY_ONE)
    prompt = list(range(40))
    for name, tenant in [("a0", "a"), ("a1", "a"), ("b0", "b")]:
        b.engine.submit(submit(name, prompt if tenant == "a" else prompt[::-1], 1, tenant=tenant, arrival=b.now))
    b.drain()
    shares = b.scheduler.shares
    assert shares.served("b") == 40 * INPUT_WEIGHT + OUTPUT_WEIGHT
    assert shares.served("a") == 40 * INPUT_WEIGHT + 4 * INPUT_WEIGHT + 2 * OUTPUT_WEIGHT  # 36 of 40 were cached


def test_a_preempted_sequence_is_not_charged_twice() -> None:
    b = bench(total_blocks=6)
    for name in ("old", "new"):
        b.engine.submit(submit(name, [ord(name[0])] * 6, max_tokens=10, tenant=name, arrival=1.0 + (name == "new")))
    b.drain()
    assert b.scheduler.totals.preemptions > 0
    assert b.scheduler.shares.served("old") == b.scheduler.shares.served("new") == 6 + 2 * 10


def test_the_tenant_that_was_served_most_gives_way_when_memory_is_short() -> None:
    b = bench(total_blocks=12, scheduling=FOUR)
    for i in range(2):
        b.engine.submit(submit(f"heavy{i}", [1 + i] * 8, max_tokens=16, tenant="heavy", arrival=1.0 + i))
    b.step()
    b.engine.submit(submit("light", [3] * 4, max_tokens=16, tenant="light", arrival=9.0))
    b.drain()
    # The light one came last, but its tenant had least; the first of all is spared.
    assert [b.finished[name].preemptions > 0 for name in ("heavy0", "heavy1", "light")] == [False, True, False]


def test_another_priority_starts_first_whatever_its_tenant_had() -> None:
    b = bench(scheduling=ONE_BY_ONE)
    flood(b, "heavy", 6)
    for _ in range(8):
        b.step()
    flood(b, "light", 2)
    flood(b, "heavy urgent", 1, priority=-1)
    b.drain()
    urgent = b.started.index("heavy urgent000")
    assert urgent < b.started.index("light000")


def test_a_low_priority_is_not_starved_by_tenants_that_come_and_go() -> None:
    b = bench(scheduling=ONE_BY_ONE)
    b.engine.submit(submit("batch", [1, 2], max_tokens=1, priority=1, arrival=b.now, tenant="batch"))
    for i in range(40):
        for twin in "ab":
            b.engine.submit(submit(f"{i}{twin}", [i, 2], max_tokens=1, arrival=b.now, tenant=f"{twin}{i % 3}"))
        b.step()
    assert "batch" in b.started[:25]  # one step of priority is 10 seconds: 2 * 10 came before


def test_a_turn_is_kept_until_there_are_blocks_enough() -> None:
    b = bench(total_blocks=8, scheduling=FOUR)
    flood(b, "many", 40, tokens=6)
    for _ in range(3):
        b.step()
    b.engine.submit(submit("wide", [7] * 28, max_tokens=2, tenant="wide", arrival=b.now))  # needs 8 blocks of 8
    b.drain()
    assert b.started.index("wide") <= 12
    assert b.finished["wide"].reason is Finish.LENGTH


def test_a_flood_does_not_get_the_others_refused() -> None:
    b = bench(scheduling=SchedulerSettings(max_running=1, max_waiting=6, chunk_tokens=64, step_tokens=80))
    flood(b, "flood", 6)
    flood(b, "other", 5)
    flood(b, "third", 1)
    b.drain()
    refused = {name for name, end in b.finished.items() if end.reason is Finish.OVERLOADED}
    # Six places: the others take the latest of the flood until it has no more than they, the third one of three.
    assert refused == {"flood003", "flood004", "flood005", "other003", "other004", "flood002"}


def test_a_single_tenants_flood_refuses_the_latest() -> None:
    b = bench(scheduling=SchedulerSettings(max_running=1, max_waiting=6, chunk_tokens=64, step_tokens=80))
    flood(b, "flood", 8)
    b.drain()
    assert [b.finished[f"flood00{i}"].reason is Finish.OVERLOADED for i in range(8)] == [False] * 6 + [True] * 2


backlogs = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(backlogs, backlogs, st.integers(1, 4), st.integers(1, 30))
def test_backlogged_tenants_never_differ_by_more_than_the_papers_bound(
    first: list[tuple[int, int]], second: list[tuple[int, int]], running: int, head_start: int
) -> None:
    scheduling = SchedulerSettings(max_running=running, max_waiting=9999, chunk_tokens=16, step_tokens=40)
    b = bench(total_blocks=20, scheduling=scheduling)
    count: dict[str, int] = defaultdict(int)

    def keep_busy(tenant: str, kinds: list[tuple[int, int]]) -> None:
        while sum(sequence.request.tenant == tenant for sequence in b.scheduler.waiting) < 4:
            prompt, answer = kinds[count[tenant] % len(kinds)]
            tokens = [ord(tenant), count[tenant] % 256, *[count[tenant] // 256] * prompt]
            name = f"{tenant}{count[tenant]}"
            b.engine.submit(submit(name, tokens, answer, tenant=tenant, arrival=b.now))
            count[tenant] += 1

    for _ in range(head_start):  # the first is there before, and so has had more
        keep_busy("a", first)
        b.step()
    keep_busy("b", second)
    served = b.scheduler.shares.served
    began = served("a"), served("b")
    longest = max(prompt + 2 for prompt, _ in first + second)
    bound = max(INPUT_WEIGHT * longest, OUTPUT_WEIGHT * 20 * 4)  # M: tokens that fit into the cache
    for _ in range(100):
        keep_busy("a", first)
        keep_busy("b", second)
        b.step()
        # What they got of late, and (from when both waited) what their counters say.
        assert abs((served("a") - began[0]) - (served("b") - began[1])) <= 2 * bound
        assert abs(served("a") - served("b")) <= bound


requests = st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, max_size=40), st.integers(5, 12))
def test_one_tenant_starts_in_the_order_of_ranks_and_all_end_with_any_number(
    sent: list[tuple[str, int, int, int]], total_blocks: int
) -> None:
    for tenants in (False, True):
        b = bench(total_blocks=total_blocks, scheduling=ONE_BY_ONE)
        for i, (tenant, priority, prompt, answer) in enumerate(sent):
            b.engine.submit(
                submit(
                    f"s{i:02}",
                    [i] * prompt,
                    answer,
                    tenant=tenant if tenants else "",
                    priority=priority,
                    arrival=float(i),
                )
            )
        b.drain()
        assert len(b.finished) == len(sent)
        if not tenants:
            ranks = sorted((i + 10.0 * priority, f"s{i:02}") for i, (_, priority, _, _) in enumerate(sent))
            possible = [name for _, name in ranks if name in b.started]
            assert b.started == possible


def test_counters_of_tenants_that_left_nothing_behind_are_forgotten() -> None:
    shares = Shares()
    shares.start("standing", 7)
    for i in range(3 * FORGET_FROM):
        shares.join(f"t{i}", {"standing"})
        assert shares.served("standing") == shares.served(f"t{i}") == 7
    assert len(shares._served) <= FORGET_FROM + 1
    shares.start("standing", 100)
    shares.join("new", {"standing"})
    assert shares.served("new") == shares.served("standing") == 107
