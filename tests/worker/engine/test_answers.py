"""Texts to score and to embed: chunk by chunk, and the whole is told once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.fake import WIDTH, expected_logprob, expected_vector
from meshlm.worker.messages import Finish, KvBudget, Scored, Submit
from tests.worker.engine.bench import Bench, bench, submit

ROOMY = SchedulerSettings(max_running=4, max_waiting=40, chunk_tokens=8, step_tokens=20)


def expected_scores(name: str, prompt: list[int], score_from: int) -> Scored:
    logprobs = [expected_logprob(prompt[:position]) for position in range(score_from, len(prompt))]
    return Scored(name, logprobs, [-logprob for logprob in logprobs])


def expected_mean(prompt: list[int]) -> list[float]:
    vectors = [expected_vector(prompt[:end]) for end in range(1, len(prompt) + 1)]
    return [sum(vector[i] for vector in vectors) / len(prompt) for i in range(WIDTH)]


def checked(b: Bench, request: Submit) -> None:
    """That an ended request was answered, rightly, if and only if it was done."""
    name, prompt = request.id, request.prompt
    done = b.finished[name].reason is Finish.DONE
    assert done == (name in b.scored or name in b.embedded)
    assert name not in b.tokens
    if not done:
        return
    if request.score_from is not None:
        assert b.scored[name] == expected_scores(name, prompt, request.score_from)
    else:
        expected = expected_mean(prompt) if request.pool == "mean" else expected_vector(prompt)
        assert b.embedded[name].vector == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [2, 8, 9, 30, 64])
@pytest.mark.parametrize("task", [{"score_from": 1}, {"pool": "mean"}, {"pool": "last"}])
def test_a_text_is_read_in_chunks_and_answered_once(task: dict[str, object], length: int) -> None:
    b = bench()
    request = submit("it", list(range(length)), max_tokens=1, **task)
    b.engine.submit(request)
    b.drain()
    assert b.finished["it"].reason is Finish.DONE
    checked(b, request)
    assert b.engine.blocks_in_use == 0
    assert b.runner.forgotten == ["it"]


def test_a_text_of_one_token_can_be_embedded() -> None:
    b = bench()
    b.engine.submit(submit("it", [5], max_tokens=1, pool="mean"))
    b.drain()
    assert b.embedded["it"].vector == expected_vector([5])


def test_cached_tokens_are_not_scored_from_memory_but_computed_from_the_first_scored_on() -> None:
    b = bench()
    prompt = list(range(30))
    b.engine.submit(submit("warm", prompt, max_tokens=1))
    b.drain()
    for score_from, cached in [(1, 0), (4, 0), (5, 4), (13, 12), (29, 28)]:
        name = f"from{score_from}"
        b.engine.submit(submit(name, prompt, max_tokens=1, score_from=score_from))
        b.drain()
        assert b.finished[name].cached_tokens == cached
        assert b.scored[name] == expected_scores(name, prompt, score_from)


def test_a_mean_takes_in_every_token_and_the_last_vector_uses_the_cache() -> None:
    b = bench()
    prompt = list(range(30))
    for name, pool, cached in [("first", "last", 0), ("mean", "mean", 0), ("last", "last", 28)]:
        b.engine.submit(submit(name, prompt, max_tokens=1, pool=pool))
        b.drain()
        assert b.finished[name].cached_tokens == cached
    assert b.embedded["mean"].vector == pytest.approx(expected_mean(prompt))
    assert b.embedded["last"].vector == expected_vector(prompt)


def test_a_text_may_fill_the_context_since_nothing_is_drawn_behind_it() -> None:
    b = bench()
    for name, length in [("fits", 64), ("long", 65)]:
        b.engine.submit(submit(name, [1] * length, max_tokens=1, score_from=1))
    b.drain()
    assert b.finished["fits"].reason is Finish.DONE
    assert b.finished["long"].reason is Finish.TOO_LONG


def test_a_text_is_scored_under_a_budget() -> None:
    b = bench(total_blocks=64, scheduling=ROOMY)
    prompt = list(range(60))
    b.engine.submit(submit("it", prompt, 1, score_from=1, kv=KvBudget(policy="window", tokens=16, sinks=4)))
    b.drain()
    # Chunks of 8; before each, of what is behind the sinks only the latest tokens are left, 16 in all.
    expected = []
    for position in range(1, 60):
        start = (position - 1) // 8 * 8
        gone = max(0, start - 16)
        expected.append(expected_logprob(prompt[:4] + prompt[4 + gone : position] if gone else prompt[:position]))
    assert b.scored["it"].logprobs == expected


def test_a_preempted_text_starts_its_answer_anew() -> None:
    b = bench(total_blocks=10, scheduling=ROOMY)
    b.engine.submit(submit("stream", [1] * 6, max_tokens=30, arrival=1.0))
    b.step()
    requests = [
        submit("scored", [2] * 30, max_tokens=1, score_from=3, arrival=2.0),
        submit("mean", [3] * 30, max_tokens=1, pool="mean", arrival=2.0),
    ]
    for request in requests:
        b.engine.submit(request)
    b.drain()
    assert b.scheduler.totals.preemptions > 0
    for request in requests:
        checked(b, request)


texts = st.tuples(
    st.integers(0, 2),
    st.integers(1, 40),
    st.sampled_from(["mean", "last", "score", "score", None]),
    st.one_of(st.none(), st.floats(1, 20)),
)
actions = st.lists(st.one_of(texts, texts, st.integers(0, 12), st.just("step"), st.just("step")), max_size=40)


@settings(max_examples=100, deadline=None)
@given(actions, st.integers(11, 30), st.sets(st.integers(1, 30), max_size=3), st.booleans())
def test_whatever_happens_an_answer_is_whole_or_there_is_none(
    script: list[object], total_blocks: int, fail_at: set[int], chunk_invariant: bool
) -> None:
    b = bench(total_blocks=total_blocks, scheduling=ROOMY, fail_at=fail_at, chunk_invariant=chunk_invariant)
    sent: list[Submit] = []
    for action in script:
        if action == "step":
            b.step()
        elif isinstance(action, int):
            b.engine.cancel(f"s{action}")
        else:
            family, length, task, deadline = action  # type: ignore[misc]
            fields: dict[str, object] = {"deadline": deadline, "arrival": b.now}
            prompt = [family] * length + [100 + family]
            if task == "score":
                fields["score_from"] = 1 + len(sent) % length
            else:
                fields["pool"] = task
            sent.append(submit(f"s{len(sent)}", prompt, 20, **fields))
            b.engine.submit(sent[-1])
    b.drain()
    assert b.engine.blocks_in_use == 0
    for request in sent:
        if request.score_from is not None or request.pool is not None:
            checked(b, request)
    assert not b.scheduler._answers._scores
    assert not b.scheduler._answers._sums
