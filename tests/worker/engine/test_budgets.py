"""Sequences with a KV budget: what they keep, that their tokens do not depend on the load, and that blocks add up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.budgets import Budgets
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.sequence import Chunk, Outcome, Sequence
from meshlm.worker.fake import expected_logprob, important, next_token
from meshlm.worker.messages import Finish, KvBudget, Limits, Submit
from tests.worker.engine.bench import GREEDY, Bench, CheckedRunner, bench, submit

CHUNK, BLOCK = 16, 4
SCHEDULING = SchedulerSettings(max_running=4, max_waiting=30, chunk_tokens=CHUNK, step_tokens=40)
WINDOW = KvBudget(policy="window", tokens=24, sinks=5)
IMPORTANCE = KvBudget(policy="importance", tokens=40)


def shortened(cache: list[int], budget: KvBudget) -> list[int]:
    """The cache without as many whole blocks as it is over the budget."""
    gone = -(-max(0, len(cache) - budget.tokens) // BLOCK) * BLOCK
    if budget.policy == "importance":
        return [cache[index] for index in important(cache, len(cache) - gone)] if gone else cache
    sinks = -(-budget.sinks // BLOCK) * BLOCK
    return cache[:sinks] + cache[sinks + gone :]


def read(prompt: list[int], budget: KvBudget) -> tuple[list[int], list[int]]:
    """The cache at the end of the prompt, before and after it is shortened there."""
    cache: list[int] = []
    whole = cache
    size = CHUNK if budget.policy == "window" else len(prompt)
    for start in range(0, len(prompt), size):
        whole = cache + prompt[start : start + size]
        cache = shortened(whole, budget)
    return whole, cache


def replay(prompt: list[int], budget: KvBudget, count: int) -> list[int]:
    """The first `count` tokens of a fake model whose cache is a plain list: shortened at the prompt's end and after
    every token behind it, and for `window` also at each multiple of CHUNK in the prompt."""
    whole, cache = read(prompt, budget)
    drawn = [next_token(words(whole), GREEDY)]
    while len(drawn) < count:
        cache = [*cache, drawn[-1]]
        drawn.append(next_token(words(cache), GREEDY))
        cache = shortened(cache, budget)
    return drawn


def words(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(2, "little") for token in tokens)


class BudgetRunner(CheckedRunner):
    """Sees to it that no sequence holds more than it may, and that what says what is important comes in one chunk."""

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        for chunk in chunks:
            budget = chunk.sequence.request.kv
            if budget is not None and budget.policy == "importance":
                check_importance(chunk, budget)
            elif budget is not None:
                assert len(chunk.sequence.blocks) * BLOCK < budget.tokens + CHUNK + BLOCK
                if chunk.start % CHUNK == 0 or chunk.start >= chunk.sequence.prompt_length:
                    assert chunk.start - chunk.sequence.evicted <= budget.tokens
        return super().run(chunks)


def check_importance(chunk: Chunk, budget: KvBudget) -> None:
    """All of the prompt until it is computed, its last CHUNK tokens (fewer than 32) in one chunk; then the budget, and
    one token in a chunk."""
    sequence, end = chunk.sequence, chunk.start + chunk.count
    prompt = sequence.prompt_length
    assert chunk.count <= CHUNK
    if chunk.start < prompt:
        assert sequence.evicted == 0
        assert len(sequence.blocks) * BLOCK < max(prompt, budget.tokens + 1) + BLOCK
        assert end <= max(0, prompt - CHUNK) or (end == prompt and chunk.count >= min(prompt, CHUNK))
    else:
        assert chunk.count == 1
        assert chunk.start - sequence.evicted <= budget.tokens
        assert len(sequence.blocks) * BLOCK < budget.tokens + 1 + BLOCK


def budget_bench(total_blocks: int = 64, **options: object) -> Bench:
    b = bench(total_blocks=total_blocks, scheduling=SCHEDULING, max_context=400, **options)
    b.runner.__class__ = BudgetRunner
    return b


@pytest.mark.parametrize("budget", [WINDOW, IMPORTANCE])
@pytest.mark.parametrize("length", [3, 16, 24, 25, 41, 100])
def test_a_budget_keeps_what_the_policy_says(budget: KvBudget, length: int) -> None:
    prompt = [(7 * i) % 251 for i in range(length)]
    b = budget_bench(chunk_invariant=True)
    b.engine.submit(submit("it", prompt, max_tokens=60, kv=budget))
    b.drain()
    assert b.tokens["it"] == replay(prompt, budget, 60)
    assert b.engine.blocks_in_use == 0


def test_a_text_longer_than_the_memory_is_read_under_a_budget() -> None:
    b = budget_bench(total_blocks=12)  # 48 tokens
    b.engine.submit(submit("it", [1] * 200, max_tokens=100, kv=WINDOW))
    b.drain()
    assert b.finished["it"].reason is Finish.LENGTH
    assert len(b.tokens["it"]) == 100


def test_the_models_context_is_the_limit_of_a_budgeted_text_too() -> None:
    b = budget_bench()
    b.engine.submit(submit("it", [1] * 390, max_tokens=100, kv=WINDOW))
    b.drain()
    assert len(b.tokens["it"]) == 10


@pytest.mark.parametrize(
    "budget",
    [
        KvBudget(policy="window", tokens=11, sinks=5),  # 2 blocks of sinks, and none besides
        KvBudget(policy="importance", tokens=35),  # the latest 32, and less than a block
        KvBudget(policy="window", tokens=4 * 64 - CHUNK + 1),  # a chunk more does not fit
        KvBudget(policy="importance", tokens=4 * 64),  # a token more does not fit
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(budget: KvBudget) -> None:
    b = budget_bench()
    b.engine.submit(submit("it", [1] * 4, kv=budget))
    b.drain()
    assert b.finished["it"].reason is Finish.TOO_LONG


@pytest.mark.parametrize(("length", "reason"), [(48, Finish.LENGTH), (49, Finish.TOO_LONG)])
def test_by_importance_a_prompt_must_fit_the_memory_and_its_answer_need_not(length: int, reason: Finish) -> None:
    b = budget_bench(total_blocks=12)  # 48 tokens
    b.engine.submit(submit("it", [1] * length, max_tokens=100, kv=IMPORTANCE))
    b.drain()
    assert b.finished["it"].reason is reason
    assert len(b.tokens["it"]) == (100 if reason is Finish.LENGTH else 0)


def test_by_importance_a_prompt_gives_its_memory_back_when_it_is_computed() -> None:
    b = budget_bench()
    b.engine.submit(submit("it", [1] * 100, max_tokens=9, kv=IMPORTANCE))
    b.step()
    assert b.engine.blocks_in_use == 25
    while not b.tokens["it"]:
        b.step()
    assert b.engine.blocks_in_use == 11  # 40 tokens, and the one just drawn


@pytest.mark.parametrize("budget", [WINDOW, IMPORTANCE])
def test_budgeted_sequences_neither_use_nor_feed_the_prefix_cache(budget: KvBudget) -> None:
    b = budget_bench()
    b.engine.submit(submit("budgeted", [1] * 20, max_tokens=2, kv=budget))
    b.drain()
    assert b.scheduler.pool.cached == 0
    b.engine.submit(submit("plain", [1] * 20, max_tokens=2))
    b.drain()
    b.engine.submit(submit("again", [1] * 20, max_tokens=2, kv=budget))
    b.drain()
    assert b.finished["plain"].cached_tokens == b.finished["again"].cached_tokens == 0


@pytest.mark.parametrize("budget", [WINDOW, IMPORTANCE])
def test_a_preempted_sequence_lets_go_of_the_same_tokens_as_before(budget: KvBudget) -> None:
    b = budget_bench(total_blocks=24)
    b.engine.submit(submit("plain", [1] * 4, max_tokens=90, arrival=1.0))
    b.step()
    prompt = [(7 * i) % 251 for i in range(70)]
    b.engine.submit(submit("it", prompt, max_tokens=80, kv=budget, arrival=2.0))
    b.drain()
    assert b.finished["it"].preemptions > 0
    assert b.tokens["it"] == replay(prompt, budget, 80)


@pytest.mark.parametrize("budget", [WINDOW, IMPORTANCE])
def test_what_stands_behind_a_prompt_is_scored_with_what_the_budget_kept(budget: KvBudget) -> None:
    prompt, written = [(7 * i) % 251 for i in range(CHUNK)] * 4, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    b = budget_bench(chunk_invariant=True)
    b.engine.submit(submit("it", prompt, generated=written, score_from=len(prompt) + 1, kv=budget))
    b.drain()
    _, cache = read(prompt, budget)
    expected = []
    for token in written[:-1]:
        cache = [*cache, token]
        expected.append(expected_logprob(cache))
        cache = shortened(cache, budget)
    assert list(b.scored["it"].logprobs) == expected


@given(st.integers(1, 64), st.integers(1, 200), st.integers(0, 1), st.integers(1, 32), st.integers(1, 40))
def test_chunks_computed_anew_end_wherever_a_token_alone_would_have_let_go(
    budget_tokens: int, prompt: int, more: int, block: int, chunk: int
) -> None:
    budgets = Budgets(block, chunk)
    budget = KvBudget(policy="window", tokens=budget_tokens)
    request = Submit(id="it", prompt=[1] * prompt, sampling=GREEDY, limits=Limits(max_tokens=1), kv=budget)
    sequence = Sequence(request, [1] * (prompt + 100))
    sequence.computed = prompt * more
    while sequence.computed < len(sequence.tokens):
        cut = budgets.next_cut(sequence, budget)
        assert sequence.computed < cut <= sequence.computed + chunk
        between = range(sequence.computed + 1, cut)
        assert not any(
            budgets.is_cut(sequence, budget, position)
            and budgets.evicted_at(budget, position) != budgets.evicted_at(budget, sequence.computed)
            for position in between
        )
        assert budgets.is_cut(sequence, budget, cut) or budgets.evicted_at(budget, cut) == sequence.evicted
        sequence.computed = cut


@given(st.integers(1, 200), st.integers(1, 80), st.data())
def test_however_the_load_cuts_a_prompt_its_last_queries_come_in_one_chunk(
    prompt: int, chunk: int, data: st.DataObject
) -> None:
    budgets, budget = Budgets(BLOCK, chunk), IMPORTANCE
    request = Submit(id="it", prompt=[1] * prompt, sampling=GREEDY, limits=Limits(max_tokens=1), kv=budget)
    sequence = Sequence(request, [1] * prompt)
    while sequence.computed < prompt:
        start = sequence.computed
        wanted = data.draw(st.integers(start + 1, budgets.next_cut(sequence, budget)))
        sequence.computed = budgets.chunk_end(sequence, budget, wanted)
        assert start < sequence.computed <= min(start + chunk, prompt)
    assert sequence.computed == prompt
    assert prompt - start >= min(32, chunk, prompt)


requests = st.tuples(
    st.integers(1, 90),  # prompt
    st.integers(1, 40),  # answer
    st.sampled_from([None, WINDOW, IMPORTANCE, KvBudget(policy="window", tokens=13, sinks=0)]),
    st.integers(-1, 1),  # priority
)
actions = st.lists(st.one_of(requests, requests, st.integers(0, 12), st.just("step"), st.just("step")), max_size=40)


@settings(max_examples=80, deadline=None)
@given(actions, st.integers(15, 40), st.sets(st.integers(1, 40), max_size=3), st.booleans())
def test_budgets_preemptions_and_cancels_leave_no_block_behind_and_change_no_token(
    script: list[object], total_blocks: int, fail_at: set[int], chunk_invariant: bool
) -> None:
    b = budget_bench(total_blocks=total_blocks, fail_at=fail_at, chunk_invariant=chunk_invariant)
    sent: dict[str, Submit] = {}
    for action in [*script, *["step"] * 5]:
        if action == "step":
            b.step()
        elif isinstance(action, int):
            b.engine.cancel(f"s{action}")
        else:
            length, answer, budget, priority = action  # type: ignore[misc]
            name = f"s{len(sent)}"
            prompt = [(len(sent) + 7 * i) % 251 for i in range(length)]
            sent[name] = submit(name, prompt, answer, kv=budget, priority=priority, arrival=b.now)
            b.engine.submit(sent[name])
        held = [block for sequence in b.scheduler.running for block in sequence.blocks]
        assert b.engine.blocks_in_use == len(set(held))
        assert all(b.scheduler.pool.holders(block) == held.count(block) for block in set(held))
        assert not any(sequence.blocks or sequence.evicted for sequence in b.scheduler.waiting)
    b.drain()
    assert b.engine.blocks_in_use == 0
    assert b.finished.keys() == sent.keys()
    for name, request in sent.items():
        budget = request.kv or KvBudget(policy="window", tokens=1000)
        assert b.tokens[name] == replay(request.prompt, budget, 40)[: len(b.tokens[name])]
        if b.finished[name].reason is Finish.LENGTH and request.kv is not None:
            assert len(b.tokens[name]) == request.limits.max_tokens
