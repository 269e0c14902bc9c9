"""The server side of a call, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from structlog.testing import capture_logs

from meshlm.chassis.calls import REQUEST_ID_KEY, CallInterceptor, Gate, request_id
from meshlm.chassis.channels import open_channel
from meshlm.chassis.errors import STATUS, MeshError, Reason, from_rpc_error, invalid
from meshlm.v1 import inference_pb2, inference_pb2_grpc

METHOD = "/meshlm.v1.InferenceService/StreamGenerate"
Behaviour = Callable[[], AsyncIterator[Any]]


class HandlerCallDetails(NamedTuple):
    """As gRPC tells an interceptor."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...]


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Answers as the test says."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.closed = asyncio.Event()
        self.endless = False
        self.seen = ""

    async def ListModels(self, request: Any, context: Any) -> Any:
        self.seen = request_id()
        if self.error:
            raise self.error
        return inference_pb2.ListModelsResponse()

    async def StreamGenerate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield inference_pb2.StreamGenerateResponse()
            while self.endless:
                await asyncio.sleep(0.01)
                yield inference_pb2.StreamGenerateResponse()
            if self.error:
                raise self.error
        finally:
            self.closed.set()


class Rig:
    def __init__(self, address: str) -> None:
        self.servicer, self.gate = Servicer(), Gate()
        self.server = grpc.aio.server(interceptors=[CallInterceptor(self.gate)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.servicer, self.server)
        self.server.add_insecure_port(address)
        self.channel = open_channel(address)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def error(self) -> MeshError:
        with pytest.raises(grpc.RpcError) as caught:
            await self.stub.ListModels(inference_pb2.ListModelsRequest())
        return from_rpc_error(caught.value)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(f"unix:{tmp_path}/s")
    await made.server.start()
    yield made
    await made.channel.close()
    await made.server.stop(0)


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_reason_survives_the_wire_with_its_status_and_details(rig: Rig, reason: Reason) -> None:
    rig.servicer.error = MeshError(reason, "why", metadata={"a": "b"}, retry_after=1.5)
    with pytest.raises(grpc.RpcError) as caught:
        await rig.stub.ListModels(inference_pb2.ListModelsRequest())
    assert caught.value.code() == STATUS[reason]
    seen = from_rpc_error(caught.value)
    assert (seen.reason, seen.message, seen.metadata, seen.retry_after) == (reason, "why", {"a": "b"}, 1.5)


async def test_the_text_of_an_unforeseen_exception_never_reaches_a_client(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    rig.servicer.error = RuntimeError("the secret prompt")
    error = await rig.error()
    assert error.reason == Reason.INTERNAL
    assert "secret" not in error.message
    assert "secret" not in capfd.readouterr().err


async def test_an_invalid_field_is_named_in_the_metadata(rig: Rig) -> None:
    rig.servicer.error = invalid("sampling.top_p", "must be in (0, 1]")
    assert (await rig.error()).metadata == {"field": "sampling.top_p"}


async def test_an_error_after_the_first_message_still_carries_its_reason(rig: Rig) -> None:
    rig.servicer.error = MeshError(Reason.ENGINE_LOST, "gone")
    received = 0
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in rig.stub.StreamGenerate(inference_pb2.StreamGenerateRequest()):
            received += 1
    assert received == 1
    assert from_rpc_error(caught.value).reason == Reason.ENGINE_LOST


async def test_a_cancel_runs_the_handlers_finally_at_once(rig: Rig) -> None:
    rig.servicer.endless = True
    call = rig.stub.StreamGenerate(inference_pb2.StreamGenerateRequest())
    await call.read()
    call.cancel()
    await asyncio.wait_for(rig.servicer.closed.wait(), 60)
    assert await rig.gate.wait_idle(60)


async def test_a_passed_deadline_runs_the_handlers_finally_and_is_reported_as_such(rig: Rig) -> None:
    rig.servicer.endless = True
    await rig.stub.ListModels(inference_pb2.ListModelsRequest())  # it is connected: the next call comes in time
    with pytest.raises(grpc.RpcError) as caught:
        async for _ in rig.stub.StreamGenerate(inference_pb2.StreamGenerateRequest(), timeout=1.5):
            pass
    assert from_rpc_error(caught.value).reason == Reason.DEADLINE
    await asyncio.wait_for(rig.servicer.closed.wait(), 60)


async def test_a_closed_gate_refuses_new_calls_and_lets_running_ones_end(rig: Rig) -> None:
    rig.servicer.endless = True
    call = rig.stub.StreamGenerate(inference_pb2.StreamGenerateRequest())
    await call.read()
    rig.gate.closed = True
    assert (await rig.error()).reason == Reason.DRAINING
    assert rig.gate.running == 1
    assert await call.read() != grpc.aio.EOF
    rig.servicer.endless = False
    while await call.read() != grpc.aio.EOF:
        pass
    assert await rig.gate.wait_idle(60)


@pytest.mark.parametrize(("sent", "kept"), [("abc-1", True), ("x" * 129, False), ("a b", False), ("", False)])
async def test_a_callers_request_id_is_kept_only_if_it_is_well_formed(rig: Rig, sent: str, kept: bool) -> None:
    await rig.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=[(REQUEST_ID_KEY, sent)])
    assert (rig.servicer.seen == sent) is kept
    assert rig.servicer.seen


class StoppedError(grpc.aio.BaseError):
    """As gRPC's own, which is not public, of a server that stops."""


class BrokenContext:
    """Of a call whose connection broke: gRPC refuses to send before it says that the call is cancelled."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error
        self.aborted = False

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    async def write(self, message: Any) -> None:
        raise self.error

    async def abort(self, *status: Any) -> None:
        self.aborted = True


@pytest.mark.parametrize("error", [grpc.aio.InternalError, StoppedError])
async def test_a_caller_whose_connection_broke_is_no_error_of_the_service(error: type[Exception]) -> None:
    servicer, context = Servicer(), BrokenContext(error)
    servicer.endless = True
    handlers = {
        "StreamGenerate": grpc.unary_stream_rpc_method_handler(
            servicer.StreamGenerate, inference_pb2.StreamGenerateRequest.FromString
        )
    }

    async def found(details: Any) -> Any:
        return handlers[details.method.rpartition("/")[2]]

    details = HandlerCallDetails(METHOD, ())
    handler: Any = await CallInterceptor(gate := Gate()).intercept_service(found, details)
    with capture_logs() as lines, pytest.raises(asyncio.CancelledError):
        await handler.unary_stream(b"", context)
    assert [line["log_level"] for line in lines] == ["info"]
    assert not context.aborted
    assert servicer.closed.is_set()
    assert gate.running == 0
