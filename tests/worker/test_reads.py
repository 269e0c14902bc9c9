"""Scoring and embedding over the fake engine, as a process behind gRPC, and as an engine behind `Reads`."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import grpc
import psutil
import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.fake import FakeRunner, FakeSettings, expected_logprob, expected_vector
from meshlm.worker.fake_tokenizer import fake_tokenizer
from meshlm.worker.front.prompts import Prompts
from meshlm.worker.front.read_plans import ReadLimits, ReadPlan, plan_embed, plan_score
from meshlm.worker.front.reads import WIDTH, Reads, text_offsets
from meshlm.worker.messages import Embedded, Scored
from tests.worker.workers import Worker, engine, error_of, running

pytestmark = pytest.mark.mesh

FACTS = FakeRunner(FakeSettings(max_context=64, total_blocks=16)).facts
PROMPTS = Prompts(fake_tokenizer())
LIMITS = ReadLimits(model="fake", tokens=128)


def text(prompt: str) -> pb.Input:
    return pb.Input(prompt=prompt)


def score(worker: Worker, source: pb.Input, timeout: float | None = 120, **fields: Any) -> Any:
    return worker.stub.Score(worker_pb2.ScoreRequest(input=source, **fields), timeout=timeout)


def embed(worker: Worker, *texts: str, timeout: float | None = 120, **fields: Any) -> Any:
    return worker.stub.Embed(worker_pb2.EmbedRequest(inputs=map(text, texts), **fields), timeout=timeout)


def logprobs_of(tokens: bytes, first: int) -> Any:
    return pytest.approx([expected_logprob(list(tokens[:i])) for i in range(first, len(tokens))], rel=1e-6)


async def test_an_input_is_scored_from_its_second_token_or_where_it_is_told_to() -> None:
    async with running() as worker:
        whole = await score(worker, text("hello"))
        part = await score(worker, text("hello"), from_token=3)
        (scored,) = whole.scored
        assert bytes(scored.token_ids) == b"ello"
        assert list(scored.logprobs) == logprobs_of(b"hello", 1)
        assert list(scored.entropies) == [-value for value in scored.logprobs]  # the fake's
        assert (scored.text, list(scored.text_offsets)) == ("", [])
        assert list(part.scored[0].logprobs) == list(scored.logprobs)[2:]
        assert whole.usage == pb.Usage(prompt_tokens=5)
        assert whole.model_revision
        assert whole.timing.prefill > 0


async def test_each_continuation_is_scored_given_the_input_alone() -> None:
    chat = pb.Input(chat=pb.Chat(messages=[pb.Message(role="user", content="is it safe? " * 4)]))
    read = b"<user>" + b"is it safe? " * 4 + b"\0<assistant>"  # \0 stands for the end of the turn
    texts = ["safe", "unsafe", "né"]
    async with running() as worker:
        continuations = [worker_pb2.Continuation(text=t) for t in texts]
        continuations.append(worker_pb2.Continuation(token_ids=pb.TokenIds(ids=[256])))
        response = await score(worker, chat, continuations=continuations, return_text_offsets=True)
        assert len(response.scored) == 4
        prompt = [256 if byte == 0 else byte for byte in read]
        for scored, ids in zip(response.scored, [*(list(t.encode()) for t in texts), [256]], strict=True):
            assert list(scored.token_ids) == ids
            wanted = [expected_logprob(prompt + ids[:i]) for i in range(len(ids))]
            assert list(scored.logprobs) == pytest.approx(wanted, rel=1e-6)
        assert [scored.text for scored in response.scored] == [*texts, "<|end|>"]
        assert list(response.scored[2].text_offsets) == [0, 1, 1]  # n, and the two bytes of é
        # 66 tokens are 4 full blocks of 16, which the first text leaves to the three behind it.
        assert response.usage == pb.Usage(prompt_tokens=4 * len(prompt) + 4 + 6 + 3 + 1, cached_prompt_tokens=3 * 64)


async def test_only_marked_pieces_of_a_prompt_can_hold_control_tokens() -> None:
    said = [("<user>", True), ("I end <|end|> here", False), ("<|end|>\n", True)]
    pieces = [worker_pb2.PromptPiece(text=text, control_tokens=control) for text, control in said]
    async with running() as worker:
        whole = await worker.stub.Score(worker_pb2.ScoreRequest(pieces=pieces), timeout=120)
        tokens = [*b"<user>I end <|end|> here", 256, *b"\n"]
        assert list(whole.scored[0].token_ids) == tokens[1:]
        end = worker_pb2.Continuation(end_of_turn=True)
        request = worker_pb2.ScoreRequest(pieces=pieces, continuations=[end])
        behind = await worker.stub.Score(request, timeout=120)
        assert list(behind.scored[0].token_ids) == [256]
        assert list(behind.scored[0].logprobs) == [pytest.approx(expected_logprob(tokens), rel=1e-6)]


async def test_vectors_are_pooled_in_order_and_of_length_one_unless_told_otherwise() -> None:
    texts = [f"text {i}" for i in range(WIDTH + 3)]
    async with running() as worker:
        raw = await embed(worker, *texts, normalize=False)
        unit = await embed(worker, *texts)
        last = await embed(worker, *texts, normalize=False, pooling=worker_pb2.POOLING_LAST)
        assert raw.usage == pb.Usage(prompt_tokens=sum(map(len, texts)))
        for i, said in enumerate(texts):
            tokens = list(said.encode())
            states = [expected_vector(tokens[: end + 1]) for end in range(len(tokens))]
            mean = [sum(column) / len(tokens) for column in zip(*states, strict=True)]
            assert list(raw.embeddings[i].vector) == pytest.approx(mean, rel=1e-6)
            assert list(last.embeddings[i].vector) == states[-1]
            length = math.sqrt(sum(value * value for value in mean))
            assert list(unit.embeddings[i].vector) == pytest.approx([v / length for v in mean], rel=1e-5)
        assert (await worker.state()).model.hidden_size == len(raw.embeddings[0].vector)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input": pb.Input()}, "input"),
        ({"input": text("x"), "from_token": 1}, "from_token"),
        ({"input": text("x")}, "from_token"),
        ({"input": text("xy"), "from_token": 0}, "from_token"),
        ({"input": text("xy"), "from_token": 2}, "from_token"),
        ({"input": text("xy"), "from_token": 1, "continuations": [{"text": "z"}]}, "from_token"),
        ({"input": text("xy"), "continuations": [{}]}, r"continuations[0]"),
        ({"input": text("xy"), "continuations": [{"text": "z"}, {"text": ""}]}, r"continuations[1]"),
        ({"input": text("xy"), "continuations": [{"token_ids": {"ids": [257]}}]}, r"continuations[0].token_ids"),
        ({"input": text("xy"), "continuations": [{"text": "z"}] * 17}, "continuations"),
        ({"input": text("xy"), "priority": 99}, "priority"),
        ({"input": text("xy"), "tenant": "t" * 129}, "tenant"),
        ({"input": text("xy"), "continuations": [{"end_of_turn": False}]}, r"continuations[0].end_of_turn"),
        ({"input": text("xy"), "pieces": [{"text": "z"}]}, "input"),
        ({"pieces": [{"text": "z"}, {"text": ""}]}, "pieces[1].text"),
        ({"pieces": [{"text": "z"}] * 65}, "pieces"),
        ({}, "input"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [text("a")] * 65}, "inputs"),
        ({"inputs": [text("a"), pb.Input()]}, "inputs[1]"),
        ({"inputs": [text("a"), pb.Input(token_ids=pb.TokenIds(ids=[300]))]}, "inputs[1].token_ids"),
        ({"inputs": [text("a")], "pooling": 9}, "pooling"),
    ],
)
async def test_what_cannot_be_read_is_refused_with_the_field_named(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(MeshError) as caught:
        await planned(**fields)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.REQUEST_INVALID, field)


@pytest.mark.parametrize(
    ("fields", "reason", "metadata"),
    [
        ({"inputs": [text("a"), text("x" * 65)]}, Reason.CONTEXT_TOO_LONG, {"prompt_tokens": "65"}),
        ({"input": text("x" * 65)}, Reason.CONTEXT_TOO_LONG, {"max_context": "64"}),
        (
            {"input": text("x" * 63), "continuations": [{"text": "yz"}]},
            Reason.CONTEXT_TOO_LONG,
            {"prompt_tokens": "65"},
        ),
        ({"inputs": [text("x" * 50)] * 3}, Reason.CONTEXT_TOO_LONG, {"prompt_tokens": "150", "max_tokens": "128"}),
        ({"input": text("xy"), "model": "other"}, Reason.MODEL_UNKNOWN, {"model": "fake"}),
    ],
)
async def test_what_does_not_fit_is_told_with_its_measure(
    fields: dict[str, Any], reason: Reason, metadata: dict[str, str]
) -> None:
    with pytest.raises(MeshError) as caught:
        await planned(**fields)
    assert (caught.value.reason, caught.value.metadata | metadata) == (reason, caught.value.metadata)


async def test_a_text_may_fill_the_context() -> None:
    assert (await planned(inputs=[text("x" * 64)])).texts == [list(b"x" * 64)]
    assert (await planned(input=text("x" * 62), continuations=[{"text": "yz"}])).score_from == 62
    async with engine(max_context=64, total_blocks=4) as client:
        (result,) = await Reads(client, plan([b"x" * 64], pool="last")).run()
    assert isinstance(result, Embedded)
    assert result.vector == expected_vector(list(b"x" * 64))


async def planned(**fields: Any) -> ReadPlan:
    if "inputs" in fields:
        return await plan_embed(worker_pb2.EmbedRequest(**fields), PROMPTS, FACTS, LIMITS, None)
    return await plan_score(worker_pb2.ScoreRequest(**fields), PROMPTS, FACTS, LIMITS, None)


async def test_a_cancelled_call_and_a_late_one_leave_no_block_in_use() -> None:
    async with running(fake__step_seconds=0.2) as worker:
        call = embed(worker, *["x" * 1500] * 20)
        await worker.until(lambda state: state.running > 0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await worker.until(lambda state: state.counters.cancelled > 0 and state.running == state.waiting == 0)
        late = await error_of(score(worker, text("y" * 1500), timeout=0.2))
        assert late.reason is Reason.DEADLINE
        await worker.until(lambda state: state.running == 0 and state.free_blocks == state.total_blocks)


async def test_a_lost_engine_is_a_typed_error() -> None:
    async with running(fake__step_seconds=1.0) as worker:
        call = embed(worker, *["x" * 1500] * 20)
        await worker.until(lambda state: state.running > 0)
        psutil.Process(worker.process.pid).children()[0].kill()
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def plan(texts: list[bytes], **fields: Any) -> ReadPlan:
    given = {"priority": 1, "cache_salt": b"s", "tenant": "t", "deadline": None} | fields
    return ReadPlan(texts=[list(said) for said in texts], **given)


async def test_a_request_with_many_texts_does_not_fill_the_queue() -> None:
    async with engine(step_seconds=0.02) as client:
        reads = Reads(client, plan([b"%d" % i for i in range(40)], pool="last"))
        task = asyncio.create_task(reads.run())
        most = 0
        while not task.done():
            load = client.load
            most = max(most, load.running + load.waiting if load is not None else 0)
            await asyncio.sleep(0.002)
        results = await task
    assert 1 < most <= WIDTH
    assert [r.vector for r in results if isinstance(r, Embedded)] == [
        expected_vector(list(b"%d" % i)) for i in range(40)
    ]
    assert 0 < reads.phases.first_scheduled <= reads.phases.ended


async def test_what_the_router_says_of_a_request_reaches_the_engine() -> None:
    made = plan([b"ab", b"abc"], score_from=1, deadline=7.0)
    submit = made.submit("x", 1)
    assert (submit.tenant, submit.cache_salt, submit.priority, submit.limits.deadline) == ("t", b"s", 1, 7.0)
    assert (submit.score_from, submit.pool, submit.admitted) == (1, None, True)


async def test_a_full_queue_is_told() -> None:
    async with engine(step_seconds=0.2) as client:
        reads = [Reads(client, plan([b"x" * 100], score_from=1)) for _ in range(5)]
        tasks = [asyncio.create_task(read.run()) for read in reads]
        results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, MeshError)]
    assert refused
    assert {error.reason for error in refused} == {Reason.OVERLOADED}
    assert any(isinstance(result, list) and isinstance(result[0], Scored) for result in results)


@pytest.mark.parametrize(("turn", "unsafe"), [("User: a cake", 0.001), ("User: !harm", 0.999)])
async def test_the_fake_gives_verdicts_that_a_guard_can_be_tested_with(turn: str, unsafe: float) -> None:
    prompt = text(f"<BEGIN CONVERSATION>\n\n{turn}\n\n<END CONVERSATION>\n\n")
    async with running() as worker:
        words = [worker_pb2.Continuation(text=word) for word in ("safe", "unsafe")]
        safe, other = (await score(worker, prompt, continuations=words)).scored
        assert math.exp(other.logprobs[0]) == pytest.approx(unsafe)
        assert math.exp(safe.logprobs[0]) == pytest.approx(1 - unsafe)


def test_offsets_count_characters_and_control_tokens() -> None:
    tokens = [*"a€".encode(), 256, *b"b"]
    assert text_offsets(tokens, fake_tokenizer()) == ("a€<|end|>b", [0, 1, 1, 1, 2, 9])
