"""Between worker and client: what goes out of an answer, with the real checks behind it and with guards that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.chassis.errors import MeshError, Reason
from meshlm.guard.checking import AnswerChecks
from meshlm.guard.config import GuardConfig, PolicyConfig
from meshlm.guard.judging import Opinion
from meshlm.guard.policy import Policies
from meshlm.router.guarding.window import OutputWindow
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, inference_pb2, worker_pb2

Moderation = inference_pb2.Moderation
KEY = "AK" + "IA" + "QWERTZUIOPASDFG2"
MAIL = "jo.doe@example.org"
SCORES = {"answer_flag_score": 0.98, "answer_confirm_score": 0.99, "answer_block_score": 0.997}
PLAIN = "Nothing but a plain word and yet another one after it. "  # 55 characters


class WordJudge:
    """`vile` in what it reads is surely harmful, `dire` perhaps. Opinions of answers come when `late` allows."""

    version = "words-1"

    def __init__(self, delays: list[int] | None = None) -> None:
        self._delays = delays or [0]
        self.gate: asyncio.Event | None = None
        self.asked = 0

    async def judge_prompt(self, *args: Any, **more: Any) -> list[Opinion]:
        return []

    async def judge_answer(self, turns: Any, answer: str, heads: Any, **more: Any) -> list[Opinion]:
        self.asked += 1
        for _ in range(self._delays[self.asked % len(self._delays)]):
            await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        read = answer[-256:]
        word, score = ("vile", 0.999) if "vile" in read else ("dire", 0.992) if "dire" in read else ("", 0.0)
        start = answer.rfind(word) if word else 0
        return [Opinion("words-1/harm", "harm", score, ("S1",), start, start + len(word))]


class Call:
    """A call of CheckOutput, without a wire."""

    def __init__(self, answers: Callable[[AsyncIterator[Any]], AsyncIterator[Any]]) -> None:
        self._requests: asyncio.Queue[Any] = asyncio.Queue()
        self._answers = answers(self._sent())
        self.cancelled = False

    async def _sent(self) -> AsyncIterator[Any]:
        while (request := await self._requests.get()) is not None:
            yield request

    async def write(self, request: Any) -> None:
        self._requests.put_nowait(request)

    async def read(self) -> Any:
        return await anext(self._answers, grpc.aio.EOF)

    async def done_writing(self) -> None:
        self._requests.put_nowait(None)

    def cancel(self) -> None:
        self.cancelled = True


class Ward:
    """What a window knows of the guard."""

    def __init__(self, answers: Any, *, allow: bool = False, seconds: float = 60.0, hold_tokens: int = 128) -> None:
        self.stub = self
        self.seconds, self.hold_tokens = seconds, hold_tokens
        self._answers, self._allow = answers, allow
        self.errors: list[BaseException] = []

    def CheckOutput(self, **more: Any) -> Call:
        return Call(self._answers)

    def admit(self) -> None:
        pass

    def answered(self) -> None:
        pass

    def failed(self, error: BaseException) -> None:
        self.errors.append(error)
        if not self._allow:
            raise MeshError(Reason.GUARD_UNAVAILABLE, "refused")


def guarded(release: str, judge: WordJudge | None, **more: Any) -> Ward:
    """A ward whose guard is the real one; addresses are redacted."""
    actions = {"pii.email": "redact", **more.pop("actions", {})}
    policies = Policies({"default": PolicyConfig(answer_release=release, actions=actions, **SCORES)}, judge)  # type: ignore[arg-type]
    checks = lambda requests: AnswerChecks(GuardConfig(), policies, lambda verdict: None).responses(requests)  # noqa: E731
    return Ward(checks, **more)


async def worker(pieces: list[str], *, choice: int = 0, failure: MeshError | None = None) -> AsyncIterator[Any]:
    """Its messages: a token for each piece."""
    for number, piece in enumerate(pieces):
        last = number + 1 == len(pieces) and failure is None
        chunk = pb.Chunk(
            choice=choice, token_offset=number, token_count=1, text=piece, finish_reason=int(last), token_ids=[number]
        )
        yield worker_pb2.RunGenerationResponse(chunk=chunk)
        await asyncio.sleep(0)
    if failure is not None:
        raise failure
    yield worker_pb2.RunGenerationResponse(end=worker_pb2.GenerationEnd())


class Seen:
    """What went out."""

    def __init__(self) -> None:
        self.chunks: list[pb.Chunk] = []
        self.moderations: list[Any] = []
        self.window: OutputWindow | None = None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def finish(self) -> int:
        return self.chunks[-1].finish_reason if self.chunks else 0

    @property
    def verdict(self) -> pb.Verdict:
        assert self.window is not None
        (verdict,) = self.window.verdicts()
        verdict.latency = 0
        return verdict


async def seen(ward: Ward, messages: AsyncIterator[Any], into: Seen | None = None) -> Seen:
    out = into or Seen()
    window = out.window = OutputWindow(ward, guard_pb2.OutputCheckStart())
    try:
        await window.open()
        async for event in window.through(messages):
            if isinstance(event, pb.Chunk):
                out.chunks.append(event)
            elif isinstance(event, Moderation):
                out.moderations.append(event)
        await window.finish()
    finally:
        window.close()
    return out


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


def replying(*replies: dict[str, Any]) -> Any:
    """A guard that says these things, one to each text, and then nothing."""

    async def answers(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        said = iter(replies)
        async for request in requests:
            if request.HasField("text"):
                reply = next(said, None)
                if reply is None:
                    await asyncio.Event().wait()
                yield guard_pb2.CheckOutputResponse(**(reply or {}))

    return answers


NONSENSE = {
    "released what was not sent": [{"released_chars": 6, "taken_chars": 5}],
    "took what was not sent": [{"released_chars": 5, "taken_chars": 6}],
    "judged what was not sent": [{"released_chars": 5, "taken_chars": 5, "judged_chars": 9}],
    "released less than before": [{"released_chars": 5, "taken_chars": 5}, {"released_chars": 4, "taken_chars": 10}],
    "judged less than before": [
        {"released_chars": 5, "taken_chars": 5, "judged_chars": 5},
        {"released_chars": 5, "taken_chars": 10, "judged_chars": 4},
    ],
    "a choice that is not there": [{"choice": 7, "released_chars": 5, "taken_chars": 5}],
    "a redaction of what is out": [
        {"released_chars": 5, "taken_chars": 5},
        {
            "released_chars": 10,
            "taken_chars": 10,
            "redactions": [guard_pb2.Redaction(char_start=2, char_end=7, replacement="x")],
        },
    ],
    "a redaction backwards": [
        {
            "released_chars": 0,
            "taken_chars": 5,
            "redactions": [guard_pb2.Redaction(char_start=4, char_end=2, replacement="x")],
        },
    ],
}


@pytest.mark.parametrize("name", NONSENSE)
async def test_a_guard_that_talks_nonsense_is_a_guard_that_failed(name: str) -> None:
    out = Seen()
    with pytest.raises(MeshError) as caught:
        await seen(Ward(replying(*NONSENSE[name])), worker(["12345", "67890", "end"]), out)
    assert caught.value.reason == Reason.GUARD_UNAVAILABLE
    assert len(out.text) <= 5
    ward = Ward(replying(*NONSENSE[name]), allow=True)
    assert (await seen(ward, worker(["12345", "67890", "end"]))).text == "1234567890end"
    assert len(ward.errors) == 1


@pytest.mark.parametrize("replies", [[], [{"released_chars": 5, "taken_chars": 5}]])
async def test_a_guard_that_falls_silent_is_not_waited_for_longer_than_it_may_take(replies: list[Any]) -> None:
    ward = Ward(replying(*replies), seconds=0.05)
    with pytest.raises(MeshError) as caught:
        await seen(ward, worker(["12345", "67890", "end"]))
    assert caught.value.reason == Reason.GUARD_UNAVAILABLE
    assert [type(error) for error in ward.errors] == [TimeoutError]


async def test_a_guard_is_not_late_while_it_owes_nothing() -> None:
    async def slow() -> AsyncIterator[Any]:
        async for message in worker(["one ", "two ", "three"]):
            yield message
            if message.chunk.text == "one ":
                await asyncio.sleep(1.6)

    ward = guarded("strict", WordJudge(), seconds=1.5)  # all of this is one window
    assert (await seen(ward, slow())).text == "one two three"
    assert ward.errors == []


async def test_what_was_judged_before_a_fault_of_the_worker_goes_out_before_it_is_told() -> None:
    out = Seen()
    with pytest.raises(MeshError) as caught:
        lost = MeshError(Reason.ENGINE_LOST, "gone")
        await seen(guarded("strict", WordJudge([7])), worker([PLAIN] * 3, failure=lost), out)
    assert caught.value.reason == Reason.ENGINE_LOST
    assert out.text == PLAIN  # 64 characters were judged: one chunk lies within


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


class Noting(Ward):
    """Keeps what its guard is told."""

    def __init__(self, ward: Ward) -> None:
        super().__init__(self._noted, hold_tokens=ward.hold_tokens)
        self._inner = ward._answers
        self.told: list[str] = []

    async def _noted(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async def noted() -> AsyncIterator[Any]:
            async for request in requests:
                if request.HasField("text"):
                    self.told.append(request.text.text)
                yield request

        async for answer in self._inner(noted()):
            yield answer


async def test_a_token_a_message_is_told_to_the_guard_in_a_message_a_window() -> None:
    """It judges after 16 tokens, 32 more, 64 more: what comes between would be told for nothing."""
    ward = Noting(guarded("strict", WordJudge()))
    pieces = ["word "] * 160
    out = await seen(ward, worker(pieces))
    assert out.text == "".join(pieces)
    assert "".join(ward.told) == out.text
    assert len(ward.told) < 20


async def test_a_guard_that_asks_for_more_than_may_be_held_is_told_what_there_is() -> None:
    def greedy(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async def answers() -> AsyncIterator[Any]:
            told, last = 0, False
            async for request in requests:
                if request.HasField("text"):
                    told, last = told + len(request.text.text), request.text.last
                    yield guard_pb2.CheckOutputResponse(
                        taken_chars=told, released_chars=told, final=last, gather_bytes=(1 << 32) - 1
                    )

        return answers()

    ward = Noting(Ward(greedy, hold_tokens=16))
    pieces = [f"{number} " for number in range(100)]
    out = await seen(ward, worker(pieces))
    assert out.text == "".join(pieces)
    assert max(told.count(" ") for told in ward.told) == 16


async def test_what_was_gathered_before_a_fault_of_the_worker_is_judged_too() -> None:
    ward = Noting(guarded("strict", WordJudge()))
    pieces = ["word "] * 30
    with pytest.raises(MeshError) as raised:
        await seen(ward, worker(pieces, failure=MeshError(Reason.ENGINE_LOST, "gone")))
    assert raised.value.reason == Reason.ENGINE_LOST
    assert "".join(ward.told) == "".join(pieces)
