"""Between worker and client: what goes out of an answer, with the real checks behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.v1 import generation_pb2 as pb
from tests.router.guarding.answers import KEY, MAIL, PLAIN, Moderation, Noting, Seen, WordJudge, guarded, seen, worker

PARTS = st.lists(
    st.sampled_from(["dire ", "vile ", KEY + " ", f" {MAIL} ", PLAIN, "word ", "結果 ", "a@b "]), max_size=14
)
CUTS = st.lists(st.integers(0, 500), max_size=12)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    bounds = sorted(min(cut, len(text)) for cut in cuts)
    return [text[a:b] for a, b in pairwise([0, *bounds, len(text)])]


@pytest.mark.parametrize("release", ["strict", "fast"])
@given(PARTS, CUTS, st.lists(st.integers(0, 9), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_what_goes_out_is_a_prefix_of_the_redacted_text_and_the_verdict_is_of_the_text_alone(
    release: str, parts: list[str], cuts: list[int], delays: list[int]
) -> None:
    text = "".join(parts)

    async def run() -> tuple[Seen, Seen]:
        whole = await seen(guarded(release, WordJudge()), worker([text]))
        return whole, await seen(guarded(release, WordJudge(delays)), worker(pieces_of(text, cuts)))

    whole, cut = asyncio.run(run())
    assert whole.verdict == cut.verdict
    for out in (whole, cut):
        assert text.replace(MAIL, "[pii.email]").startswith(out.text)
        stopped = out.verdict.action == pb.Verdict.ACTION_BLOCK
        assert out.finish == (pb.FINISH_REASON_CONTENT_FILTER if stopped else pb.FINISH_REASON_STOP)
        if not stopped:
            assert out.text == text.replace(MAIL, "[pii.email]")
        assert [chunk.token_offset for chunk in out.chunks] == sorted(chunk.token_offset for chunk in out.chunks)
        offsets = [moderation.check_offset for moderation in out.moderations]
        assert offsets == sorted(offsets)
        actions = [moderation.action for moderation in out.moderations]
        assert all(action == Moderation.ACTION_PASS for action in actions[:-1])
        assert stopped == (bool(actions) and actions[-1] != Moderation.ACTION_PASS)
        if release == "strict":
            assert Moderation.ACTION_RETRACT not in actions
        assert MAIL not in out.text
        assert KEY not in out.text


async def test_strict_lets_nothing_out_that_no_verdict_covers_and_reads_on_meanwhile() -> None:
    judge = WordJudge()
    judge.gate = asyncio.Event()
    out, pieces = Seen(), [PLAIN[:11]] * 400
    taken = 0

    async def counted() -> AsyncIterator[Any]:
        nonlocal taken
        async for message in worker(pieces):
            taken += 1
            yield message

    running = asyncio.ensure_future(seen(guarded("strict", judge, hold_tokens=32), counted(), out))
    for _ in range(3_000):
        await asyncio.sleep(0)
    assert out.text == ""
    assert judge.asked == 3  # two windows wait, and a third is why the guard takes no more
    covered = 192 // 11 + 1  # messages up to the end of the second window: the third is told in one
    assert covered + 30 <= taken <= covered + 34  # and 32 tokens that the guard has not taken
    judge.gate.set()
    await running
    assert out.text == "".join(pieces)


async def test_fast_sends_at_once_and_takes_back_what_a_late_opinion_condemns() -> None:
    judge = WordJudge()
    judge.gate = asyncio.Event()
    out = Seen()
    pieces = [PLAIN, PLAIN, "this is vile ", PLAIN, PLAIN]
    running = asyncio.ensure_future(seen(guarded("fast", judge), worker(pieces), out))
    while len(out.text) < 178:  # the last one waits for the verdict on all
        await asyncio.sleep(0)
    judge.gate.set()
    await running
    assert out.finish == pb.FINISH_REASON_CONTENT_FILTER
    assert [m.action for m in out.moderations] == [Moderation.ACTION_PASS, Moderation.ACTION_RETRACT]
    passed, taken_back = out.moderations
    assert (passed.char_start, passed.char_end, passed.check_offset) == (0, 64, 64)
    assert out.text[taken_back.char_start : taken_back.char_end].startswith("vile ")
    assert taken_back.char_end == len(out.text)
    assert list(taken_back.categories) == ["S1"]


async def test_a_stop_tells_where_without_having_sent_it() -> None:
    out = await seen(guarded("strict", None), worker(["The key: ", KEY[:5], KEY[5:], " is mine"]))
    (stop,) = out.moderations
    assert stop.action == Moderation.ACTION_STOP
    assert (stop.char_start, stop.char_end) == (9, 9 + len(KEY))
    assert out.text == "The key: "
    assert out.chunks[-1].token_offset == 1


@given(PARTS, CUTS)
@settings(max_examples=40, deadline=None)
def test_redaction_replaces_and_offsets_after_it_are_those_of_the_text_that_went_out(
    parts: list[str], cuts: list[int]
) -> None:
    text = MAIL + " " + "".join(parts).replace(KEY, "").replace("vile", "").replace("dire", "") + KEY + " "
    out = asyncio.run(seen(guarded("strict", WordJudge()), worker(pieces_of(text, cuts))))
    told = text.replace(MAIL, "[pii.email]")
    verdict = out.verdict
    assert told[verdict.char_start : verdict.char_end] == KEY
    stop = out.moderations[-1]
    assert told[stop.char_start : stop.char_end] == KEY
    for chunk in out.chunks:
        replaced = "[pii" in chunk.text or "email]" in chunk.text
        assert not (replaced and chunk.token_ids)


async def test_tokens_of_what_is_replaced_are_withheld_and_others_are_not() -> None:
    out = await seen(guarded("strict", None), worker(["Write to ", "jo.doe@", "example", ".org", " now", "."]))
    assert out.text == "Write to [pii.email] now."
    assert [list(chunk.token_ids) for chunk in out.chunks] == [[0], [], [], [], [4], [5]]
    assert [chunk.token_count for chunk in out.chunks] == [1] * 6
    assert out.verdict.action == pb.Verdict.ACTION_REDACT


async def test_choices_are_judged_apart() -> None:
    async def two() -> AsyncIterator[Any]:
        first, second = worker(["The key: ", KEY, " x"]), worker(["Hello ", "big ", "world"], choice=1)
        for _ in range(3):
            yield await anext(first)
            yield await anext(second)

    out = await seen(guarded("strict", None), two())
    texts = {n: "".join(chunk.text for chunk in out.chunks if chunk.choice == n) for n in (0, 1)}
    assert texts == {0: "The key: ", 1: "Hello big world"}
    assert {m.choice for m in out.moderations if m.action == Moderation.ACTION_STOP} == {0}


async def test_a_token_a_message_is_told_to_the_guard_in_a_message_a_window() -> None:
    """It judges after 16 tokens, 32 more, 64 more: what comes between would be told for nothing."""
    ward = Noting(guarded("strict", WordJudge()))
    pieces = ["word "] * 160
    out = await seen(ward, worker(pieces))
    assert out.text == "".join(pieces)
    assert "".join(ward.told) == out.text
    assert len(ward.told) < 20
