"""The gRPC face of a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

import grpc
import structlog

from meshlm.chassis.calls import seconds_left
from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.life import Life
from meshlm.chassis.prefixes import TextPrefix
from meshlm.chassis.validation import check_input
from meshlm.v1 import worker_pb2, worker_pb2_grpc
from meshlm.v1.generation_pb2 import Input
from meshlm.worker.config import WorkerConfig
from meshlm.worker.engine.budgets import Budgets
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.measures import Measures
from meshlm.worker.front.plans import Plan, make_plan
from meshlm.worker.front.prompts import INLINE_BYTES, Prompts
from meshlm.worker.front.read_plans import ReadLimits, plan_embed, plan_score
from meshlm.worker.front.reads import Reads, embed_response, score_response
from meshlm.worker.front.streams import Generation
from meshlm.worker.front.text_prefixes import TextPrefixes, text_blocks
from meshlm.worker.messages import Embedded, ModelFacts, Scored

log = structlog.get_logger()


@dataclass(frozen=True)
class ServedModel:
    """What is known of the model once it is loaded."""

    prompts: Prompts
    facts: ModelFacts
    revision: str


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """`model` and `life` are set by the composition root as they come to be."""

    def __init__(self, config: WorkerConfig, client: EngineClient, measures: Measures) -> None:
        self.model: ServedModel | None = None
        self.life: Life | None = None
        self._config = config
        self._client = client
        self._measures = measures
        self._read_limits = ReadLimits(config.model_name, config.max_read_tokens)
        self._text_prefixes = TextPrefixes()
        self._routers = 0  # that watch

    async def RunGeneration(
        self, request: worker_pb2.RunGenerationRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[worker_pb2.RunGenerationResponse, None]:
        model = self._ready_model()
        facts, seconds = model.facts, seconds_left(context)
        budgets = Budgets(facts.block_size, self._config.scheduler.chunk_tokens)
        plan = await make_plan(request, model.prompts, facts, budgets, self._config.model_name, seconds)
        await self._note_text(request.generation.input, plan, facts.block_size)
        interval = self._config.stream_interval
        generation = Generation(self._client, plan, model.prompts.tokenizer, interval=interval)
        try:
            async with aclosing(generation.responses(model.revision)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._measures.record(generation)

    async def _note_text(self, source: Input, plan: Plan, block_size: int) -> None:
        """What the prefix cache will hold of this prompt, by its text. With a KV policy nothing of it gets there."""
        if plan.kv is not None:
            return
        arguments = (TextPrefix(source, plan.cache_salt), plan.prompt, block_size, plan.cache_salt)
        if source.ByteSize() <= INLINE_BYTES:
            pairs = text_blocks(*arguments)
        else:
            pairs = await asyncio.to_thread(text_blocks, *arguments)
        self._text_prefixes.note(pairs)

    async def Score(
        self, request: worker_pb2.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ScoreResponse:
        model = self._ready_model()
        plan = await plan_score(request, model.prompts, model.facts, self._read_limits, seconds_left(context))
        reads = Reads(self._client, plan)
        results = await self._read(reads)
        offsets = request.return_text_offsets
        return score_response(reads, results, model.prompts.tokenizer, offsets=offsets, revision=model.revision)

    async def Embed(
        self, request: worker_pb2.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.EmbedResponse:
        model = self._ready_model()
        plan = await plan_embed(request, model.prompts, model.facts, self._read_limits, seconds_left(context))
        reads = Reads(self._client, plan)
        results = await self._read(reads)
        normalize = request.normalize if request.HasField("normalize") else True
        return embed_response(reads, results, normalize=normalize, revision=model.revision)

    async def _read(self, reads: Reads) -> list[Scored | Embedded]:
        try:
            return await reads.run()
        finally:
            self._measures.record_reads(reads)

    async def CountInputTokens(
        self, request: worker_pb2.CountInputTokensRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.CountInputTokensResponse:
        model = self._ready_model()
        check_input(request.input, "input")
        tokens = await model.prompts.encode(
            request.input, control_tokens=False, vocab_size=model.facts.vocab_size, path="input"
        )
        given = request.input.WhichOneof("input") == "token_ids"
        return worker_pb2.CountInputTokensResponse(
            prompt_tokens=len(tokens),
            token_text=model.prompts.tokenizer.decode(tokens, skip_control=False) if given else "",
        )

    async def WatchLoad(
        self, request: worker_pb2.WatchLoadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[worker_pb2.WatchLoadResponse, None]:
        log.info("watched", watcher=request.watcher[:128])
        with self._counted(request.watcher):
            async with aclosing(self._client.watch()) as changes:
                async for _ in changes:
                    yield self._state()

    @contextmanager
    def _counted(self, watcher: str) -> Iterator[None]:
        """One more router, if it is one; the others are told at once."""
        if watcher != "router":
            yield
            return
        self._routers += 1
        self._client.wake_watchers()
        try:
            yield
        finally:
            self._routers -= 1
            self._client.wake_watchers()

    def _ready_model(self) -> ServedModel:
        if self.model is None or not self._client.able:
            raise MeshError(Reason.ENGINE_LOST, "the engine is not ready", retry_after=1.0)
        return self.model

    def _state(self) -> worker_pb2.WatchLoadResponse:
        load = self._client.load
        draining = self.life is not None and self.life.draining
        state = worker_pb2.WatchLoadResponse(
            replica=self._config.name,
            region=self._config.region,
            model=self._described_model(),
            ready=self.model is not None and self._client.able and not draining,
            draining=draining,
            waiting_limit=self._client.waiting_limit,
            step_seconds=self._client.median_step_seconds,
            counters=worker_pb2.EngineCounters(engine_starts=self._client.starts),
            routers=self._routers,
        )
        if self.model is not None:
            state.block_size = self.model.facts.block_size
        if load is not None:
            state.running, state.waiting = load.running, load.waiting
            state.free_blocks, state.total_blocks = load.free_blocks, load.total_blocks
            state.pending_prefill_tokens = load.pending_prefill_tokens
            state.prefix_digest = load.digest
            state.text_digest = self._text_prefixes.digest(load.digest)
            state.counters.steps = load.steps_total
            state.counters.preemptions = load.preemptions_total
            state.counters.cancelled = load.cancelled_total
            state.counters.blocks_freed_after_cancel = load.freed_after_cancel_total
            state.counters.out_of_memory = load.out_of_memory_total
        return state

    def _described_model(self) -> worker_pb2.WorkerModel:
        described = worker_pb2.WorkerModel(name=self._config.model_name)
        if self.model is not None:
            facts = self.model.facts
            described.revision = self.model.revision
            described.max_context = min(facts.max_context, facts.total_blocks * facts.block_size)
            described.chat = self.model.prompts.chat
            described.vocab_size = facts.vocab_size
            described.quantization = facts.quantization
            described.weight_bytes = facts.weight_bytes
            described.kv_bytes = facts.kv_bytes
            described.kv_dtype = facts.kv_dtype
            described.engine = facts.engine
            described.hidden_size = facts.hidden_size
            described.kv_policies = facts.kv_budgets
        return described
