"""Who may call, for what, and what is said of a request that is none, over a real socket."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import pytest

from meshlm.chassis.errors import Reason, from_rpc_error
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2
from tests.router.calls import collect, failure, text_of


@pytest.mark.parametrize("header", ["Bearer wrong", "a-key", "Basic a-key", ""])
async def test_a_call_without_a_known_key_is_refused_on_every_rpc(mesh: Any, header: str) -> None:
    metadata = [("authorization", header)]
    for call in (
        mesh.stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata),
        mesh.stub.CountTokens(inference_pb2.CountTokensRequest(), metadata=metadata),
        mesh.stub.Generate(inference_pb2.GenerateRequest(), metadata=metadata),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            await call
        assert from_rpc_error(caught.value).reason == Reason.KEY_INVALID
    mesh.metadata = metadata
    assert (await failure(mesh.stream())).reason == Reason.KEY_INVALID


async def test_token_ids_need_the_right_and_are_judged_by_their_text(mesh: Any) -> None:
    source = pb.Input(token_ids=pb.TokenIds(ids=[1, 2]))
    assert (await failure(mesh.stream(input=source))).reason == Reason.KEY_NOT_ALLOWED
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], raw_prompts=True),))
    assert text_of(await collect(mesh.stream(input=source))) == "Hello big world"
    assert mesh.guard.inputs[-1].token_text == "decoded"


async def test_an_unknown_model_is_told_and_an_alias_is_resolved(mesh: Any) -> None:
    assert (await failure(mesh.stream(model="none"))).reason == Reason.MODEL_UNKNOWN
    assert (await collect(mesh.stream(model="alias")))[0].start.routing.model == "m"
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], models=("other",)),))
    assert (await failure(mesh.stream(model="m"))).reason == Reason.KEY_NOT_ALLOWED


@pytest.mark.parametrize(
    ("right", "asked", "given"),
    [
        ("interactive", pb.PRIORITY_UNSPECIFIED, pb.PRIORITY_INTERACTIVE),
        ("interactive", pb.PRIORITY_BATCH, pb.PRIORITY_BATCH),
        ("batch", pb.PRIORITY_CRITICAL, pb.PRIORITY_BATCH),
        ("critical", pb.PRIORITY_CRITICAL, pb.PRIORITY_CRITICAL),
    ],
)
async def test_no_request_is_more_urgent_than_its_key_allows(mesh: Any, right: str, asked: int, given: int) -> None:
    mesh.rekey((dataclasses.replace(mesh.config.keys[0], priority=right),))
    await collect(mesh.stream(priority=asked))
    assert [request.generation.priority for worker in mesh.workers for request in worker.requests] == [given]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"sampling": {"temperature": 3.0}}, "generation.sampling.temperature"),
        ({"kv_policy": {"mode": "MODE_WINDOW", "tokens": 63}}, "generation.kv_policy.tokens"),
        ({"sampling": {"top_p": 0.0}}, "generation.sampling.top_p"),
        ({"sampling": {"n": 9}}, "generation.sampling.n"),
        ({"sampling": {"stop": [""]}}, "generation.sampling.stop"),
        ({"sampling": {"max_tokens": 5, "min_tokens": 6}}, "generation.sampling.min_tokens"),
        ({"sampling": {"logit_bias": {1: float("nan")}}}, "generation.sampling.logit_bias"),
        ({"session": "x" * 129}, "generation.session"),
        ({"priority": 9}, "generation.priority"),
        ({"cache_policy": -1}, "generation.cache_policy"),
        ({"adapter": "a"}, "generation.adapter"),
        ({"input": pb.Input()}, "generation.input"),
        (
            {"input": pb.Input(chat=pb.Chat(messages=[pb.Message(role="user", content="x", name="a b")]))},
            "generation.input.chat.messages[0].name",
        ),
        ({"input": pb.Input(prompt="")}, "generation.input.prompt"),
        ({"sampling": {"temperature": 1.0}, "resume_from": 3}, "resume_from"),
        ({"sampling": {"n": 2}, "resume_from": 3}, "resume_from"),
    ],
)
async def test_a_bad_field_is_named(mesh: Any, fields: dict[str, Any], path: str) -> None:
    error = await failure(mesh.stream(**fields))
    assert error.reason == Reason.REQUEST_INVALID
    assert error.metadata["field"] == path


async def test_an_input_that_is_too_large_is_neither_answered_nor_counted(mesh: Any) -> None:
    source = pb.Input(prompt="x" * (mesh.config.max_input_bytes + 1))
    assert (await failure(mesh.stream(input=source))).metadata["field"] == "generation.input"
    with pytest.raises(grpc.RpcError) as caught:
        await mesh.stub.CountTokens(inference_pb2.CountTokensRequest(input=source), metadata=mesh.metadata)
    assert from_rpc_error(caught.value).metadata["field"] == "input"


async def test_an_oversized_message_gets_a_typed_error(mesh: Any) -> None:
    assert (await failure(mesh.stream("x" * (5 * 1024 * 1024)))).reason == Reason.REQUEST_INVALID
    assert text_of(await collect(mesh.stream())) == "Hello big world"
