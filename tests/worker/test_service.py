"""The worker as a process: `python -m meshlm.worker.main` with the fake engine, over gRPC on a unix socket."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.fake import BROKEN, CRASH, HANG, KILL, OUT_OF_MEMORY, expected_tokens
from meshlm.worker.messages import Sampling
from tests.worker.workers import STARTING_SECONDS, Worker, error_of, running

pytestmark = pytest.mark.mesh

METHODS = ["RunGeneration", "Score", "Embed", "CountInputTokens", "WatchLoad"]


async def collect(call: Any) -> list[worker_pb2.RunGenerationResponse]:
    return [response async for response in call]


async def rest(call: Any) -> list[worker_pb2.RunGenerationResponse]:
    """What comes on a call of which something was read."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def answer(responses: list[worker_pb2.RunGenerationResponse]) -> list[int]:
    return [token for response in responses for token in response.chunk.token_ids]


def expected(prompt: str, count: int) -> list[int]:
    return expected_tokens(list(prompt.encode()), Sampling(temperature=0), count)


async def test_sigterm_lets_streams_end_refuses_new_calls_and_exits_with_zero() -> None:
    async with running(fake__step_seconds=0.02) as worker:
        endless = worker.call("endless", max_tokens=2000)  # holds the worker until all was seen
        await endless.read()
        streams = [worker.call(f"p{i}", max_tokens=60) for i in range(4)]
        for stream in streams:
            await stream.read()  # it is accepted
        watch = worker.stub.WatchLoad(worker_pb2.WatchLoadRequest())
        await watch.read()
        worker.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            while not (await watch.read()).draining:
                pass
        refused = await error_of(collect(worker.call()))
        assert refused.reason is Reason.DRAINING
        for i, stream in enumerate(streams):
            assert answer(await rest(stream)) == expected(f"p{i}", 60)
        assert worker.process.poll() is None
        endless.cancel()
        assert await asyncio.to_thread(worker.process.wait, 60) == 0


async def test_kill_minus_nine_of_the_engine_is_typed_and_health_goes_down_and_comes_back() -> None:
    async with running(fake__step_seconds=0.01) as worker:
        bystander = asyncio.create_task(collect(worker.call("bystander", max_tokens=1000)))
        await worker.until(lambda state: state.running == 1)
        health = worker.health.Watch(health_pb2.HealthCheckRequest(service="meshlm.v1.WorkerService"))
        serving = health_pb2.HealthCheckResponse.SERVING
        assert (await health.read()).status == serving
        lost = await error_of(collect(worker.call(KILL.decode())))
        assert (lost.reason, lost.retry_after) == (Reason.ENGINE_LOST, 1.0)
        assert (await error_of(bystander)).reason is Reason.ENGINE_LOST
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await health.read()).status == serving
        await worker.until(lambda state: state.ready and state.counters.engine_starts == 2)
        assert await worker.serving()
        assert answer(await collect(worker.call())) == expected("hello", 6)


async def test_a_crash_tells_the_client_nothing_of_the_exception() -> None:
    async with running() as worker:
        crashed = await error_of(collect(worker.call(CRASH.decode())))
        assert crashed.reason is Reason.ENGINE_LOST
        assert "told to crash" not in crashed.message


async def test_a_hanging_engine_is_replaced() -> None:
    async with running(hang_seconds=4.0) as worker:
        hung = await error_of(collect(worker.call(HANG.decode())))
        assert hung.reason is Reason.ENGINE_LOST
        await worker.until(lambda state: state.ready and state.counters.engine_starts == 2)


async def test_two_hundred_cancelled_calls_leave_no_block_in_use() -> None:
    async with running(fake__step_seconds=0.002) as worker:

        async def leave(i: int) -> None:
            call = worker.call(f"prompt {i}", max_tokens=2000)
            await call.read()
            await call.read()
            call.cancel()

        await asyncio.gather(*(leave(i) for i in range(200)))
        await worker.until(lambda state: state.counters.cancelled == 200)
        state = await worker.state()
        assert (state.running, state.waiting) == (0, 0)
        assert state.free_blocks == state.total_blocks
        assert state.counters.blocks_freed_after_cancel >= 200


async def test_a_deadline_ends_the_sequence_in_the_engine() -> None:
    async with running(fake__step_seconds=0.01) as worker:
        cancelled = 0
        while not cancelled:  # where it is late before it reaches the engine, it shows nothing
            late = await error_of(collect(worker.call(max_tokens=1000, timeout=0.5)))
            assert late.reason is Reason.DEADLINE
            await worker.until(lambda state: state.free_blocks == state.total_blocks and not state.running)
            cancelled = (await worker.state()).counters.cancelled


async def test_out_of_memory_ends_one_call_and_the_worker_lives() -> None:
    async with running() as worker:
        assert (await error_of(collect(worker.call(OUT_OF_MEMORY.decode())))).reason is Reason.OUT_OF_MEMORY
        assert answer(await collect(worker.call())) == expected("hello", 6)
        assert (await worker.state()).counters.engine_starts == 1


async def test_no_numbers_end_a_call_as_internal_and_the_worker_lives() -> None:
    async with running() as worker:
        error = await error_of(collect(worker.call(BROKEN.decode())))
        assert error.reason is Reason.INTERNAL
        assert "no number" in error.message
        assert answer(await collect(worker.call())) == expected("hello", 6)
        assert (await worker.state()).counters.engine_starts == 1


async def test_a_slow_reader_holds_up_nobody_and_gets_every_token() -> None:
    async with running(fake__step_seconds=0.001) as worker:
        slow = worker.call("slow", max_tokens=1500)
        await slow.read()
        assert answer(await collect(worker.call("quick", max_tokens=50))) == expected("quick", 50)
        await worker.until(lambda state: state.running == 0)  # the whole answer is made, and waits for its reader
        assert answer(await rest(slow)) == expected("slow", 1500)


async def test_what_cannot_work_is_refused_with_the_field_named() -> None:
    async with running(fake__max_context=64, fake__total_blocks=8) as worker:

        async def refused(**fields: Any) -> MeshError:
            sampling = pb.Sampling(**fields.pop("sampling", {}))
            generation = pb.Generation(
                **{"input": pb.Input(prompt="hello"), "sampling": sampling} | fields.pop("generation", {})
            )
            call = worker.stub.RunGeneration(worker_pb2.RunGenerationRequest(generation=generation, **fields))
            return await error_of(collect(call))

        fields = {
            "generation.input": await refused(generation={"input": pb.Input()}),
            "generation.input.token_ids": await refused(
                generation={"input": pb.Input(token_ids=pb.TokenIds(ids=[257]))}
            ),
            "generation.sampling.top_p": await refused(sampling={"top_p": float("nan")}),
            "generation.sampling.logit_bias": await refused(sampling={"logit_bias": {257: 1.0}}),
            "generation.sampling.stop_token_ids": await refused(sampling={"stop_token_ids": [300]}),
            "generated": await refused(generated=[257]),
            "resume_from": await refused(resume_from=1, sampling={"n": 2}),
            "so_far": await refused(so_far=[worker_pb2.ChoiceSoFar()], sampling={"n": 2}),
        }
        for name, error in fields.items():
            assert (error.reason, error.metadata["field"]) == (Reason.REQUEST_INVALID, name)
        ended = worker_pb2.ChoiceSoFar(resume_from=3, ended=True)
        for so_far in (
            [ended, ended],
            [ended, worker_pb2.ChoiceSoFar(generated=[257])],
            [worker_pb2.ChoiceSoFar(), worker_pb2.ChoiceSoFar(resume_from=2**32 - 1, ended=True)],
        ):
            assert (await refused(so_far=so_far, sampling={"n": 2})).metadata["field"] == "so_far"
        too_long = await refused(generation={"input": pb.Input(prompt="x" * 64)})
        assert (too_long.reason, too_long.metadata["prompt_tokens"]) == (Reason.CONTEXT_TOO_LONG, "64")
        assert (await refused(generation={"model": "other"})).reason is Reason.MODEL_UNKNOWN
        assert (await refused(generation={"adapter": "other"})).reason is Reason.MODEL_UNKNOWN
        fitted = await collect(worker.call("x" * 60, max_tokens=100))
        assert fitted[0].accepted.max_tokens == 4
        assert answer(fitted) == expected("x" * 60, 4)


async def test_inputs_are_counted_as_they_will_be_computed() -> None:
    async with running() as worker:
        chat = pb.Input(chat=pb.Chat(messages=[pb.Message(role="user", content="hi <|end|>")]))
        counted = await worker.stub.CountInputTokens(worker_pb2.CountInputTokensRequest(input=chat))
        # "<user>" 6, "hi " 3, "<|end|>" as text 7, the template's own end 1, "<assistant>" 11
        assert counted.prompt_tokens == 28
        call = worker.stub.RunGeneration(
            worker_pb2.RunGenerationRequest(generation=pb.Generation(input=chat, sampling=pb.Sampling(max_tokens=1)))
        )
        assert (await collect(call))[0].accepted.prompt_tokens == 28
        ids = pb.Input(token_ids=pb.TokenIds(ids=[*b"abc", 256]))
        counted = await worker.stub.CountInputTokens(worker_pb2.CountInputTokensRequest(input=ids))
        assert (counted.prompt_tokens, counted.token_text) == (4, "abc<|end|>")


async def test_a_model_that_cannot_be_read_ends_the_worker_with_its_reason_in_the_log(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    variables = {"MODEL_PATH": str(broken), "SERVER__LISTEN": f"unix:{tmp_path}/w", "SERVER__ADMIN_LISTEN": ""}
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "meshlm.worker.main"],
        env=os.environ | {f"MESHLM__WORKER__{key}": value for key, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=STARTING_SECONDS,
        check=False,
    )
    assert ended.returncode == 1
    assert "the model cannot be read" in ended.stderr
    assert str(broken) in ended.stderr


async def test_sigterm_while_the_engine_loads_ends_both_and_exits_with_zero(tmp_path: Path) -> None:
    worker = Worker(tmp_path, hang_seconds=1)
    await worker.health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=STARTING_SECONDS)
    children = _children(worker.process.pid)
    assert await worker.end() == 0
    assert not any(map(_alive, children))
    await worker.channel.close()


async def test_the_engine_is_gone_when_the_worker_was_killed() -> None:
    async with running() as worker:
        children = _children(worker.process.pid)
        assert len(children) == 1
        worker.process.kill()
        worker.process.wait()
        async with asyncio.timeout(60):
            while _alive(children[0]):
                await asyncio.sleep(0.01)


async def outcome(worker: Worker, method: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    """How a call with these bytes ends."""
    unary = method in ("Score", "Embed", "CountInputTokens")
    make = worker.channel.unary_unary if unary else worker.channel.unary_stream
    call = make(f"/meshlm.v1.WorkerService/{method}")(data, timeout=120)
    try:
        if method == "WatchLoad":
            await call.read()
            call.cancel()
        else:
            await (call if unary else collect(call))
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def test_malformed_messages_get_a_typed_error_and_the_worker_lives() -> None:
    codes = grpc.StatusCode

    @settings(max_examples=60, deadline=None)
    @given(st.one_of(st.binary(max_size=200), requests()), st.sampled_from(METHODS))
    def attack(data: bytes, method: str) -> None:
        code, details = loop.run_until_complete(outcome(worker, method, data))
        # Bytes that are no message never reach our code: gRPC itself answers them.
        undecodable = code is codes.INTERNAL and "deserializing" in details
        assert code in (codes.OK, codes.INVALID_ARGUMENT, codes.NOT_FOUND) or undecodable

    async def afterwards() -> None:
        assert answer(await collect(worker.call())) == expected("hello", 6)
        assert (await worker.state()).counters.engine_starts == 1
        assert (await error_of(collect(worker.call("x" * (5 * 1024 * 1024))))).reason is Reason.REQUEST_INVALID
        assert await worker.end() == 0

    loop = asyncio.new_event_loop()
    manager = running(fake__max_context=64, fake__total_blocks=64)
    worker = loop.run_until_complete(manager.__aenter__())
    try:
        attack()
        loop.run_until_complete(afterwards())
    finally:
        loop.run_until_complete(manager.__aexit__(None, None, None))
        loop.close()


def requests() -> st.SearchStrategy[bytes]:
    """Well-formed messages with wild values."""
    numbers = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1.0, -1.0]))
    words = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
    sampling = st.fixed_dictionaries(
        {"max_tokens": st.integers(0, 8)},
        optional={
            **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"), numbers),
            **dict.fromkeys(("top_k", "min_tokens", "logprobs", "n"), words),
            "seed": st.integers(0, 2**64 - 1),
            "stop": st.lists(st.text(max_size=4), max_size=3),
            "stop_token_ids": st.lists(words, max_size=3),
            "logit_bias": st.dictionaries(words, numbers, max_size=3),
        },
    ).map(lambda fields: pb.Sampling(**fields))
    inputs: st.SearchStrategy[Message] = st.one_of(
        st.text(max_size=80).map(lambda text: pb.Input(prompt=text)),
        st.lists(words, max_size=5).map(lambda ids: pb.Input(token_ids=pb.TokenIds(ids=ids))),
        st.lists(st.tuples(st.sampled_from(["user", "assistant", "x", ""]), st.text(max_size=20)), max_size=3).map(
            lambda turns: pb.Input(chat=pb.Chat(messages=[pb.Message(role=r, content=c) for r, c in turns]))
        ),
    )
    return st.builds(
        lambda source, drawn, generated, resume, so_far: worker_pb2.RunGenerationRequest(
            generation=pb.Generation(input=source, sampling=drawn),
            generated=generated,
            resume_from=resume,
            so_far=so_far,
        ).SerializeToString(),
        inputs,
        sampling,
        st.lists(words, max_size=3),
        words,
        st.lists(
            st.builds(
                worker_pb2.ChoiceSoFar,
                resume_from=words,
                generated=st.lists(words, max_size=3),
                ended=st.booleans(),
            ),
            max_size=3,
        ),
    )


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
