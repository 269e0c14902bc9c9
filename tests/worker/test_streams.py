"""From tokens to chunks, without an engine; and with a real engine process behind `Generation`."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.fake import END, KILL, expected_tokens
from meshlm.worker.fake_tokenizer import fake_tokenizer
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_stream import Event
from meshlm.worker.front.plans import Plan, SoFar
from meshlm.worker.front.streams import Choice, Generation
from meshlm.worker.messages import Finish, Finished, Limits, NewToken, Sampling, Started, TokenLogprob
from tests.worker.workers import engine as running

TOKENIZER = fake_tokenizer()
GREEDY = Sampling(temperature=0)


def plan(prompt: bytes = b"hello", **fields: object) -> Plan:
    """`generated` and `resume_from` are a single choice's."""
    already = {name: fields.pop(name) for name in ("generated", "resume_from") if name in fields}
    limits = {name: fields.pop(name) for name in ("max_tokens", "min_tokens", "stop_token_ids") if name in fields}
    given = {
        "so_far": (SoFar(**already),) if already else (),  # type: ignore[arg-type]
        "sampling": GREEDY,
        "stops": (),
        "choices": 1,
        "priority": 0,
        "cache_salt": b"",
        "tenant": "",
        "kv": None,
        "return_token_ids": True,
    } | fields
    return Plan(prompt=list(prompt), limits=Limits(**{"max_tokens": 100} | limits), **given)  # type: ignore[arg-type]


def tokens(data: bytes) -> list[Event]:
    return [NewToken("", byte) for byte in data]


def chunks_of(choice: Choice, batches: list[list[Event]]) -> list[pb.Chunk]:
    return [chunk for batch in batches if (chunk := choice.advance(batch)) is not None]


def test_chunks_are_gapless_and_characters_whole() -> None:
    choice = Choice(0, plan(), TOKENIZER)
    data = "né€".encode()  # 1, 2 and 3 bytes
    chunks = chunks_of(choice, [tokens(data[i : i + 1]) for i in range(6)])
    assert [(chunk.token_offset, chunk.token_count, chunk.text) for chunk in chunks] == [
        (0, 1, "n"),
        (1, 1, ""),
        (2, 1, "é"),
        (3, 1, ""),
        (4, 1, ""),
        (5, 1, "€"),
    ]
    assert b"".join(bytes(chunk.token_ids) for chunk in chunks) == data


def test_a_reader_that_is_behind_gets_one_larger_chunk() -> None:
    choice = Choice(0, plan(), TOKENIZER)
    [chunk] = chunks_of(choice, [[Started("", 4, 1.0), *tokens(b"abc"), Finished(id="", reason=Finish.LENGTH)]])
    assert (chunk.token_count, chunk.text, chunk.finish_reason) == (3, "abc", pb.FINISH_REASON_LENGTH)


def test_no_part_of_a_stop_string_gets_out_and_later_tokens_are_not_counted() -> None:
    choice = Choice(0, plan(stops=("STOP",)), TOKENIZER)
    chunks = chunks_of(choice, [tokens(b"abS"), tokens(b"TO"), tokens(b"Pxy"), tokens(b"z")])
    assert "".join(chunk.text for chunk in chunks) == "ab"
    assert chunks[-1].finish_reason == pb.FINISH_REASON_STOP
    assert chunks[-1].matched_stop == "STOP"
    assert sum(chunk.token_count for chunk in chunks) == choice.made == 6


def test_held_text_is_given_out_where_the_answer_ends_without_a_stop_string() -> None:
    choice = Choice(0, plan(stops=("STOP",)), TOKENIZER)
    chunks = chunks_of(choice, [tokens(b"abST"), [Finished(id="", reason=Finish.LENGTH)]])
    assert [chunk.text for chunk in chunks] == ["ab", "ST"]
    assert (chunks[1].token_offset, chunks[1].token_count) == (4, 0)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    choice = Choice(0, plan(stops=("b",), min_tokens=3), TOKENIZER)
    chunks = chunks_of(choice, [tokens(b"ababa"), tokens(b"b")])
    assert "".join(chunk.text for chunk in chunks) == "aba"
    assert choice.made == 4


def test_a_stop_token_ends_with_its_name_and_is_no_part_of_the_answer() -> None:
    choice = Choice(0, plan(), TOKENIZER)
    chunks = chunks_of(choice, [tokens(b"a"), [Finished(id="", reason=Finish.STOP_TOKEN, stop_token=END)]])
    assert chunks[1].finish_reason == pb.FINISH_REASON_STOP
    assert chunks[1].matched_stop == "<|end|>"
    assert choice.made == 1


def test_tokens_before_a_deadline_are_delivered_and_then_it_is_an_error() -> None:
    choice = Choice(0, plan(), TOKENIZER)
    [chunk] = chunks_of(choice, [[*tokens(b"ab"), Finished(id="", reason=Finish.DEADLINE)]])
    assert chunk.text == "ab"
    assert choice.failure is not None
    assert choice.failure.reason is Reason.DEADLINE


def test_logprobs_name_the_chosen_and_the_most_likely_tokens() -> None:
    choice = Choice(0, plan(), TOKENIZER)
    [chunk] = chunks_of(choice, [[NewToken("", 97, -0.5, (TokenLogprob(98, -0.25),))]])
    assert chunk.logprobs[0].chosen == pb.TokenLogprob(token_id=97, text="a", logprob=-0.5)
    assert list(chunk.logprobs[0].top) == [pb.TokenLogprob(token_id=98, text="b", logprob=-0.25)]


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.data())
def test_resumed_text_is_the_rest_of_the_first_stream(text: str, stops: list[str], data: st.DataObject) -> None:
    made = text.encode()
    cut = data.draw(st.integers(0, len(made)))
    events: list[Event] = [*tokens(made), Finished(id="", reason=Finish.LENGTH)]
    before = chunks_of(Choice(0, plan(stops=tuple(stops)), TOKENIZER), [[event] for event in events])
    resumed = Choice(0, plan(stops=tuple(stops), resume_from=cut), TOKENIZER)
    after = chunks_of(resumed, [events])
    sent = [chunk.text for chunk in before if chunk.token_offset < cut and chunk.token_count]
    assert "".join(sent) + "".join(chunk.text for chunk in after) == "".join(chunk.text for chunk in before)
    ids = [token for chunk in before if chunk.token_offset < cut for token in chunk.token_ids]
    assert resumed.take_skipped() == ("".join(sent), ids)
    assert resumed.take_skipped() == ("", [])
    assert before[-1].finish_reason == after[-1].finish_reason
    if sum(chunk.token_count for chunk in before) >= cut and after[0].token_count:
        assert after[0].token_offset == cut


async def collect(client: EngineClient, made: Plan, interval: float = 0.0) -> list[worker_pb2.RunGenerationResponse]:
    async with aclosing(Generation(client, made, TOKENIZER, interval=interval).responses("rev")) as responses:
        return [response async for response in responses]


def answer(responses: list[worker_pb2.RunGenerationResponse], choice: int = 0) -> bytes:
    chunks = [response.chunk for response in responses if response.HasField("chunk")]
    return b"".join(bytes(chunk.token_ids) for chunk in chunks if chunk.choice == choice)


@pytest.mark.mesh
async def test_a_call_is_accepted_streamed_and_ended_with_usage_that_only_grows() -> None:
    async with running(step_seconds=0.005) as client:
        responses = await collect(client, plan(max_tokens=5))
    assert responses[0].WhichOneof("event") == "accepted"
    assert responses[-1].WhichOneof("event") == "end"
    assert responses[0].accepted == worker_pb2.GenerationAccepted(prompt_tokens=5, max_tokens=5, model_revision="rev")
    assert answer(responses) == bytes(expected_tokens(list(b"hello"), GREEDY, 5))
    used = [response.usage.completion_tokens for response in responses]
    assert used == sorted(used)
    assert responses[-1].usage == pb.Usage(prompt_tokens=5, completion_tokens=5)
    assert responses[-1].end.timing.prefill >= 0.005
    assert responses[-1].end.timing.decode >= 4 * 0.005


@pytest.mark.mesh
async def test_the_first_token_comes_at_once_and_later_ones_together() -> None:
    async with running(step_seconds=0.02) as client:
        began = time.monotonic()
        responses = await collect(client, plan(max_tokens=60), interval=0.4)
        seconds = time.monotonic() - began
        longest = counts(await collect(client, plan(max_tokens=100), interval=3600.0))
    assert sum(counts(responses)) == 60
    assert len(counts(responses)) <= 10 * seconds + 3  # in tenths of a second: one stream is no crowd
    assert answer(responses) == bytes(expected_tokens(list(b"hello"), GREEDY, 60))
    first, others = longest  # the first has what came while its reader was kept waiting, too
    assert 1 <= first < 100
    assert first + others == 100


def counts(responses: list[worker_pb2.RunGenerationResponse]) -> list[int]:
    """Tokens of each message."""
    return [response.chunk.token_count for response in responses if response.HasField("chunk")]


@pytest.mark.mesh
async def test_a_long_interval_holds_back_neither_the_end_nor_an_error() -> None:
    async with running(step_seconds=0.002) as client, asyncio.timeout(60):
        assert len(answer(await collect(client, plan(max_tokens=3), interval=3600.0))) == 3
        with pytest.raises(MeshError) as caught:
            await collect(client, plan(KILL, max_tokens=50), interval=3600.0)
        assert caught.value.reason is Reason.ENGINE_LOST


@pytest.mark.mesh
async def test_a_reader_that_does_not_read_gets_the_rest_in_one_message_when_it_does() -> None:
    async with running(step_seconds=0.0015) as client:
        slow = Generation(client, plan(max_tokens=2000), TOKENIZER)
        async with aclosing(slow.responses("")) as responses:
            first = [await anext(responses) for _ in range(2)]  # accepted, and the first token
            async with asyncio.timeout(60):
                while client.load is None or client.load.steps_total < 2000 or client.load.running:
                    await asyncio.sleep(0.01)
            rest = [response async for response in responses]
    begun = first[1].chunk.token_count
    assert 1 <= begun < 2000
    assert [response.chunk.token_count for response in rest] == [2000 - begun, 0]  # the rest, and the end


@pytest.mark.mesh
async def test_other_choices_have_their_own_seeds_and_find_the_prompt_cached() -> None:
    seeded = plan(b"x" * 40, choices=3, max_tokens=6, sampling=Sampling(seed=7))
    async with running() as client:
        responses = await collect(client, seeded)
        async with asyncio.timeout(60):
            while client.load is None or client.load.cached_blocks != 2:
                await asyncio.sleep(0.005)  # 40 tokens are 2 full blocks of 16, computed once
    for choice in range(3):
        expected = expected_tokens(list(b"x" * 40), Sampling(seed=7 + choice), 6)
        assert answer(responses, choice) == bytes(expected)
    assert responses[-1].usage == pb.Usage(prompt_tokens=40, completion_tokens=18)


@pytest.mark.mesh
async def test_a_stop_string_ends_the_sequence_in_the_engine_too() -> None:
    drawn = bytes(expected_tokens(list(b"hello"), GREEDY, 30))
    stop = drawn[10:13].decode()
    async with running(step_seconds=0.002) as client:
        responses = await collect(client, plan(max_tokens=2000, stops=(stop,)))
        async with asyncio.timeout(60):
            while client.load is None or client.load.cancelled_total != 1:
                await asyncio.sleep(0.005)
        assert client.load.free_blocks == client.load.total_blocks
    assert answer(responses)[:13] == drawn[: len(answer(responses))][:13]
    assert "".join(response.chunk.text for response in responses) == drawn[: drawn.find(stop.encode())].decode()


@pytest.mark.mesh
async def test_a_broken_stream_goes_on_behind_the_tokens_made_elsewhere() -> None:
    drawn = expected_tokens(list(b"hello"), GREEDY, 8)
    async with running() as client:
        whole = plan(max_tokens=8, generated=drawn[:5], resume_from=3)
        responses = await collect(client, whole)
        assert answer(responses) == bytes(drawn[3:])
        assert "".join(response.skipped_text for response in responses) == bytes(drawn[:3]).decode()
        assert responses[-1].usage.completion_tokens == 8
        complete = await collect(client, plan(max_tokens=8, generated=drawn, resume_from=8))
        assert complete[-2].chunk.finish_reason == pb.FINISH_REASON_LENGTH
        assert answer(complete) == b""


@pytest.mark.mesh
async def test_several_choices_go_on_each_behind_its_own_tokens() -> None:
    drawn = [expected_tokens(list(b"hello"), Sampling(seed=7 + choice), 8) for choice in range(4)]
    so_far = (
        SoFar(resume_from=8, ended=True),
        SoFar(generated=drawn[1], resume_from=6),  # whole, but its end was never told
        SoFar(generated=drawn[2][:5], resume_from=3),
        SoFar(),
    )
    async with running() as client:
        made = plan(max_tokens=8, choices=4, sampling=Sampling(seed=7), so_far=so_far)
        responses = await collect(client, made)
        assert client.load is not None
        assert client.load.free_blocks == client.load.total_blocks
    assert [answer(responses, choice) for choice in range(4)] == [
        b"",
        bytes(drawn[1][6:]),
        bytes(drawn[2][3:]),
        bytes(drawn[3]),
    ]
    skipped = dict.fromkeys(range(4), "")
    for response in responses:
        skipped[response.chunk.choice] += response.skipped_text
    assert skipped == {0: "", 1: bytes(drawn[1][:6]).decode(), 2: bytes(drawn[2][:3]).decode(), 3: ""}
    finished = [response.chunk.choice for response in responses if response.chunk.finish_reason]
    assert sorted(finished) == [1, 2, 3]
    assert responses[-1].usage.completion_tokens == 32


@pytest.mark.mesh
async def test_an_engine_that_dies_in_mid_stream_is_a_typed_error() -> None:
    async with running() as client:
        with pytest.raises(MeshError) as caught:
            await collect(client, plan(KILL, max_tokens=50))
        assert caught.value.reason is Reason.ENGINE_LOST


@pytest.mark.mesh
async def test_a_full_queue_is_told_before_the_call_is_accepted() -> None:
    async with running(step_seconds=0.02) as client:
        endless = [asyncio.create_task(collect(client, plan(b"p%d" % i, max_tokens=2000))) for i in range(2)]
        async with asyncio.timeout(60):
            while client.load is None or client.load.running < 2:
                await asyncio.sleep(0.005)
        waiting = [asyncio.create_task(collect(client, plan(b"w%d" % i, max_tokens=2))) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(MeshError) as caught:
            await collect(client, plan())
        assert caught.value.reason is Reason.OVERLOADED
        assert not any(task.done() for task in (*endless, *waiting))
        for task in endless:
            task.cancel()
        await asyncio.gather(*endless, return_exceptions=True)
        assert [len(answer(responses)) for responses in await asyncio.gather(*waiting)] == [2, 2]


@pytest.mark.mesh
async def test_leaving_a_call_frees_its_blocks() -> None:
    async with running(step_seconds=0.002) as client:
        async with aclosing(Generation(client, plan(choices=2, max_tokens=2000), TOKENIZER).responses("")) as responses:
            async for response in responses:
                if response.chunk.choice == 1:
                    break
        async with asyncio.timeout(60):
            while client.load is None or client.load.cancelled_total < 2:
                await asyncio.sleep(0.005)
        assert client.load.free_blocks == client.load.total_blocks


@pytest.mark.mesh
async def test_other_choices_start_where_the_first_ends_without_a_token() -> None:
    sampling = Sampling(seed=next(s for s in range(99) if expected_tokens([1], Sampling(seed=s), 1, 2) == [END]))
    made = plan(b"\x01", choices=2, max_tokens=3, sampling=sampling, stop_token_ids=frozenset([END]))
    async with running(end_one_in=2) as client, asyncio.timeout(60):
        responses = await collect(client, made)
    finished = {response.chunk.choice for response in responses if response.chunk.finish_reason}
    assert finished == {0, 1}


@pytest.mark.mesh
async def test_a_queue_that_fills_up_behind_a_request_does_not_end_its_other_choices() -> None:
    async with running(step_seconds=0.02) as client:
        several = asyncio.create_task(collect(client, plan(choices=4, max_tokens=40)))
        async with asyncio.timeout(60):
            while client.load is None or client.load.steps_total < 1:
                await asyncio.sleep(0.001)
        others = [asyncio.create_task(collect(client, plan(b"w%d" % i, max_tokens=2))) for i in range(3)]
        responses = await several
        assert [len(answer(responses, choice)) for choice in range(4)] == [40] * 4
        await asyncio.gather(*others, return_exceptions=True)
