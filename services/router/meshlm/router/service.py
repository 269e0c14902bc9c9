"""The public servicer: thin, for the pipeline is elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import grpc

from meshlm.chassis.calls import outgoing_metadata, request_id, seconds_left
from meshlm.chassis.errors import MeshError, Reason, from_rpc_error
from meshlm.chassis.telemetry import current_trace_id
from meshlm.chassis.validation import check_input
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.router.identity import KeyRing
from meshlm.router.measure import measure
from meshlm.router.pipeline import Pipeline
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.routing.routes import Query, listed_names
from meshlm.router.wording import word
from meshlm.router.work import Work, check_size
from meshlm.v1 import inference_pb2 as pb
from meshlm.v1 import inference_pb2_grpc, worker_pb2
from meshlm.v1.generation_pb2 import Chunk, Generation


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, config: RouterConfig, keys: KeyRing, fleet: Fleet, pipeline: Pipeline) -> None:
        self._config = config
        self._keys = keys
        self._fleet = fleet
        self._pipeline = pipeline
        self._routes = pipeline.routes

    async def _caller(self, context: grpc.aio.ServicerContext) -> KeyConfig:
        """Who asks. A router that has just started answers nobody before it knows its workers."""
        key = self._keys.identify(context.invocation_metadata())
        await self._fleet.introduced()
        return key

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[pb.StreamGenerateResponse, None]:
        key = await self._caller(context)
        ids = (request_id(), current_trace_id())
        work = Work.begin(request, key, ids, seconds_left(context), self._config)
        async with contextlib.aclosing(self._pipeline.run(work)) as responses:
            async for response in responses:
                yield response

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        stream = pb.StreamGenerateRequest(generation=request.generation)
        whole = _Whole()
        try:
            async with contextlib.aclosing(self.StreamGenerate(stream, context)) as responses:
                async for response in responses:
                    whole.add(response)
        except MeshError as error:
            if error.reason != Reason.BUDGET_SPENT or not whole.paid:
                raise  # what a limit cut was paid for, and is given: its finish reason says so
        return whole.response()

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """Of no limit: it is read from memory, and to count it would cost more than to answer it."""
        key = await self._caller(context)
        models = self._fleet.models()
        default = self._config.default_model or (next(iter(models)) if len(models) == 1 else "")
        listed = listed_names(self._routes.names(key), models, default)
        for name, replicas in models.items():
            if key.models and name not in key.models:
                continue
            model = next(r.state.model for r in replicas if r.state is not None)
            listed.append(
                pb.Model(
                    name=name,
                    revision=model.revision,
                    max_context=model.max_context,
                    adapters=model.adapters,
                    chat=model.chat,
                    ready_replicas=sum(r.usable for r in replicas),
                    is_default=name == default,
                )
            )
        return pb.ListModelsResponse(models=sorted(listed, key=lambda model: model.name))

    async def ExplainRoute(
        self, request: pb.ExplainRouteRequest, context: grpc.aio.ServicerContext
    ) -> pb.ExplainRouteResponse:
        """Of the caller's own key: what it may see of itself it may see beforehand."""
        key = await self._caller(context)
        asked = pb.StreamGenerateRequest(generation=request.generation)
        work = Work.begin(asked, key, (request_id(), current_trace_id()), seconds_left(context), self._config)
        await self._pipeline.inquiries.admit(key, work.request_id)
        return await self._pipeline.explainer.explain(work)

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> pb.CountTokensResponse:
        key = await self._caller(context)
        check_input(request.input, "input")
        check_size(measured := measure(request.input), self._config, "input")
        await self._pipeline.inquiries.admit(key, request_id())
        self._pipeline.residency.check(regions := self._pipeline.residency.regions(key))
        generation = Generation(model=request.model, input=request.input)
        query = Query(generation, key, measured.tokens, request_id(), path="model", trial=True)
        model = self._routes.resolve(query).model
        replica = self._fleet.choose(Wanted(model=model, tenant=key.tenant, regions=regions)).replicas[0]
        ask = worker_pb2.CountInputTokensRequest(input=word(request.input, key).source)
        timeout = seconds_left(context) or self._config.default_deadline_seconds
        try:
            counted = await replica.stub.CountInputTokens(ask, timeout=timeout, metadata=outgoing_metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        return pb.CountTokensResponse(prompt_tokens=counted.prompt_tokens, model=model)


class _Whole:
    """A stream, gathered."""

    def __init__(self) -> None:
        self._response = pb.GenerateResponse()
        self._texts: dict[int, list[str]] = {}
        self._choices: dict[int, pb.Choice] = {}

    @property
    def paid(self) -> bool:
        """Whether some of the answer was billed, and told to its end."""
        return self._response.HasField("end") and self._response.usage.completion_tokens > 0

    def add(self, response: pb.StreamGenerateResponse) -> None:
        self._response.usage.CopyFrom(response.usage)
        kind = response.WhichOneof("event")
        if kind == "start":
            self._response.start.CopyFrom(response.start)
        elif kind == "end":
            self._response.end.CopyFrom(response.end)
        elif kind == "chunk":
            self._add_chunk(response.chunk)
        elif kind == "moderation" and response.moderation.action == pb.Moderation.ACTION_RETRACT:
            self._retract(response.moderation)

    def _add_chunk(self, chunk: Chunk) -> None:
        choice = self._choices.setdefault(chunk.choice, pb.Choice(index=chunk.choice))
        self._texts.setdefault(chunk.choice, []).append(chunk.text)
        choice.token_ids.extend(chunk.token_ids)
        choice.logprobs.extend(chunk.logprobs)
        choice.finish_reason = chunk.finish_reason
        if chunk.HasField("matched_stop"):
            choice.matched_stop = chunk.matched_stop

    def _retract(self, moderation: pb.Moderation) -> None:
        """What a stream's reader is told to take back is never given here."""
        index = moderation.choice
        self._texts[index] = ["".join(self._texts.get(index, ()))[: moderation.char_start]]
        choice = self._choices.setdefault(index, pb.Choice(index=index))
        del choice.token_ids[:]
        del choice.logprobs[:]

    def response(self) -> pb.GenerateResponse:
        for index, choice in sorted(self._choices.items()):
            choice.text = "".join(self._texts[index])
            self._response.choices.append(choice)
        return self._response
