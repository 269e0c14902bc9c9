"""Score and Embed at the engine: texts go in, and what the model thinks of them comes out."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from contextlib import ExitStack

from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_stream import EngineLost, EngineStream
from meshlm.worker.front.read_plans import ReadPlan
from meshlm.worker.front.streams import Phases, engine_lost, failure_of
from meshlm.worker.messages import Embedded, Finished, Scored
from meshlm.worker.text.detokenizer import Detokenizer
from meshlm.worker.text.tokenizer import Tokenizer

# Sequences of one request at the engine at a time: enough to fill a step, and no queue full of one caller's.
WIDTH = 8
_numbers = itertools.count()


class Reads:
    """All texts of one request."""

    def __init__(self, client: EngineClient, plan: ReadPlan) -> None:
        self.plan = plan
        self.phases = Phases(time.monotonic())
        self.cached = 0  # tokens found in the prefix cache
        self._client = client
        self._arrived = asyncio.Event()
        self._live: dict[int, EngineStream] = {}  # by index of the text
        self._results: dict[int, Scored | Embedded] = {}

    @property
    def tokens(self) -> int:
        return sum(map(len, self.plan.texts))

    @property
    def usage(self) -> pb.Usage:
        return pb.Usage(prompt_tokens=self.tokens, cached_prompt_tokens=self.cached)

    @property
    def timing(self) -> pb.Timing:
        return pb.Timing(queue=self.phases.queue, prefill=self.phases.prefill)

    async def run(self) -> list[Scored | Embedded]:
        """What came of each text, in order. Leaving early cancels every sequence. Raises MeshError."""
        count, opened = len(self.plan.texts), 0
        with ExitStack() as sequences:
            while opened < count or self._live:
                alone = self.plan.shares_prefix and not self._results
                while opened < count and len(self._live) < (1 if alone else WIDTH):
                    self._open(opened, sequences)
                    opened += 1
                await self._arrived.wait()
                self._arrived.clear()
                for index in list(self._live):
                    self._advance(index)
        return [self._results[index] for index in range(count)]

    def _open(self, index: int, sequences: ExitStack) -> None:
        request = self.plan.submit(f"r{next(_numbers)}", index)
        try:
            self._live[index] = sequences.enter_context(self._client.submit(request, self._arrived))
        except EngineLost as error:
            raise engine_lost(error) from None

    def _advance(self, index: int) -> None:
        try:
            events = self._live[index].take()
        except EngineLost as error:
            raise engine_lost(error) from None
        for event in events:
            match event:
                case Scored() | Embedded():
                    self._results[index] = event
                case Finished():
                    del self._live[index]
                    self._end(event)

    def _end(self, event: Finished) -> None:
        failure = failure_of(event.reason)
        if failure is not None:
            raise failure
        self.cached += event.cached_tokens
        began = self.phases.first_scheduled
        self.phases.first_scheduled = min(began, event.first_scheduled) if began else event.first_scheduled
        self.phases.ended = max(self.phases.ended, event.ended)


def score_response(
    reads: Reads, results: list[Scored | Embedded], tokenizer: Tokenizer, *, offsets: bool, revision: str
) -> worker_pb2.ScoreResponse:
    response = worker_pb2.ScoreResponse(usage=reads.usage, timing=reads.timing, model_revision=revision)
    for text, result in zip(reads.plan.texts, results, strict=True):
        assert isinstance(result, Scored)  # noqa: S101  it was asked for
        tokens = text[reads.plan.score_from :]
        scored = response.scored.add(token_ids=tokens, logprobs=result.logprobs, entropies=result.entropies)
        if offsets:
            scored.text, begins = text_offsets(tokens, tokenizer)
            scored.text_offsets.extend(begins)
    return response


def embed_response(
    reads: Reads, results: list[Scored | Embedded], *, normalize: bool, revision: str
) -> worker_pb2.EmbedResponse:
    response = worker_pb2.EmbedResponse(usage=reads.usage, timing=reads.timing, model_revision=revision)
    for result in results:
        assert isinstance(result, Embedded)  # noqa: S101  it was asked for
        response.embeddings.add(vector=_unit(result.vector) if normalize else result.vector)
    return response


def text_offsets(tokens: list[int], tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The text of tokens that follow others, and where in it each begins, in characters."""
    detokenizer, pieces, begins, length = Detokenizer(tokenizer, skip_control=False, continues=True), [], [], 0
    for token in tokens:
        begins.append(length)
        pieces.append(detokenizer.push(token))
        length += len(pieces[-1])
    return "".join(pieces) + detokenizer.flush(), begins


def _unit(vector: list[float]) -> list[float]:
    """Scaled to length 1. The zero vector has no direction, and stays."""
    length = math.hypot(*vector)
    return [value / length for value in vector] if length else vector
