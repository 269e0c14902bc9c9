"""From the engine's tokens to the wire's chunks: text, stop strings, offsets, finish reasons, usage and timing."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.front.engine_client import EngineClient
from meshlm.worker.front.engine_stream import EngineLost, EngineStream, Event
from meshlm.worker.front.plans import Plan
from meshlm.worker.messages import Finish, Finished, NewToken, Started, TokenLogprob
from meshlm.worker.text.detokenizer import Detokenizer
from meshlm.worker.text.stop_strings import StopStrings
from meshlm.worker.text.tokenizer import Tokenizer

_sequence_numbers = itertools.count()


def engine_lost(error: EngineLost) -> MeshError:
    return MeshError(Reason.ENGINE_LOST, str(error), retry_after=1.0)


def failure_of(reason: Finish) -> MeshError | None:
    """The error that an engine's reason to end a sequence means to a caller; None for a proper end."""
    match reason:
        case Finish.STOP_TOKEN | Finish.LENGTH | Finish.DONE:
            return None
        case Finish.DEADLINE:
            return MeshError(Reason.DEADLINE, "the deadline passed")
        case Finish.OUT_OF_MEMORY:
            return MeshError(Reason.OUT_OF_MEMORY, "the device had no memory for this sequence", retry_after=1.0)
        case Finish.NON_FINITE:
            return MeshError(
                Reason.INTERNAL, "the model computed what is no number: its weights or its device are broken"
            )
        case Finish.OVERLOADED:
            return MeshError(Reason.OVERLOADED, "the waiting queue is full", retry_after=1.0)
        case Finish.TOO_LONG:
            return MeshError(Reason.CONTEXT_TOO_LONG, "the input leaves no room for an answer")
        case Finish.CANCELLED:
            return MeshError(Reason.ENGINE_LOST, "the engine ended", retry_after=1.0)


@dataclass
class Phases:
    """When what happened to a sequence, seconds of `time.monotonic`; zero for what did not."""

    arrival: float
    first_scheduled: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0

    @property
    def queue(self) -> float:
        return (self.first_scheduled or self.ended) - self.arrival

    @property
    def prefill(self) -> float:
        return (self.first_token or self.ended) - self.first_scheduled if self.first_scheduled else 0.0

    @property
    def decode(self) -> float:
        return self.ended - self.first_token if self.first_token else 0.0


class Choice:
    """One choice's way from tokens to chunks. Knows no engine: events in, chunks out."""

    def __init__(self, index: int, plan: Plan, tokenizer: Tokenizer) -> None:
        self.index = index
        self.phases = Phases(time.monotonic())
        self.made = 0  # tokens of the answer
        self.cached = 0  # prompt tokens from the prefix cache
        self.preemptions = 0
        self.finish: pb.FinishReason.ValueType = pb.FINISH_REASON_UNSPECIFIED
        self.failure: MeshError | None = None
        self._plan = plan
        self._already = plan.already(index)
        self._skipped = ""
        self._skipped_ids: list[int] = []
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, continues=True)
        self._stops = StopStrings(plan.stops)

    @property
    def done(self) -> bool:
        return self.failure is not None or self.finish != pb.FINISH_REASON_UNSPECIFIED

    @property
    def drawn(self) -> int:
        """Tokens that the engine drew: those of the answer that were not made elsewhere."""
        return max(0, self.made - len(self._already.generated))

    def advance(self, events: list[Event]) -> pb.Chunk | None:
        """One chunk for all that came: a reader that is behind gets fewer and larger ones. None: nothing to tell."""
        chunk = pb.Chunk(choice=self.index)
        for event in events:
            match event:
                case Started():
                    self.phases.first_scheduled, self.cached = event.first_scheduled, event.cached_tokens
                case NewToken():
                    self._take_token(chunk, event)
                case Finished():
                    self._take_end(chunk, event)
        chunk.token_offset = self.made - chunk.token_count
        return chunk if chunk.token_count or chunk.text or chunk.finish_reason else None

    def take_skipped(self) -> tuple[str, list[int]]:
        """Text and ids of tokens that are not sent again, once: a guard must see the text."""
        skipped, self._skipped = (self._skipped, self._skipped_ids), ""
        self._skipped_ids = []
        return skipped

    def _take_token(self, chunk: pb.Chunk, event: NewToken) -> None:
        if self.done:  # drawn before the engine heard of the stop string
            return
        self.made += 1
        self.phases.first_token = self.phases.first_token or time.monotonic()
        text = self._detokenizer.push(event.token)
        if self.made > self._plan.limits.min_tokens:
            text = self._stops.push(text)
        if self.made > self._already.resume_from:
            self._put_token(chunk, event, text)
        else:
            self._skipped += text
            if self._plan.return_token_ids:
                self._skipped_ids.append(event.token)
        if self._stops.matched is not None:
            self._finish(chunk, pb.FINISH_REASON_STOP, self._stops.matched)

    def _put_token(self, chunk: pb.Chunk, event: NewToken, text: str) -> None:
        chunk.token_count += 1
        chunk.text += text
        if self._plan.return_token_ids:
            chunk.token_ids.append(event.token)
        if event.logprob is not None:
            chosen = self._logprob(TokenLogprob(event.token, event.logprob))
            chunk.logprobs.add(chosen=chosen, top=[self._logprob(item) for item in event.top])

    def _take_end(self, chunk: pb.Chunk, event: Finished) -> None:
        self.cached, self.preemptions = event.cached_tokens, event.preemptions
        self.phases = Phases(event.arrival, event.first_scheduled, event.first_token, event.ended)
        if self.done:
            return
        self.failure = failure_of(event.reason)
        if self.failure is None:
            chunk.text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
            if event.stop_token is not None:
                self._finish(chunk, pb.FINISH_REASON_STOP, self._tokenizer.token_text(event.stop_token))
            else:
                self._finish(chunk, pb.FINISH_REASON_LENGTH, None)

    def _finish(self, chunk: pb.Chunk, reason: pb.FinishReason.ValueType, matched: str | None) -> None:
        self.finish = chunk.finish_reason = reason
        self.phases.ended = self.phases.ended or time.monotonic()
        if matched is not None:
            chunk.matched_stop = matched

    def _logprob(self, item: TokenLogprob) -> pb.TokenLogprob:
        return pb.TokenLogprob(token_id=item.token, text=self._tokenizer.token_text(item.token), logprob=item.logprob)


class Generation:
    """All choices of one request at the engine."""

    def __init__(self, client: EngineClient, plan: Plan, tokenizer: Tokenizer, *, interval: float = 0.0) -> None:
        """`interval`: seconds between two messages of a choice where many streams run, see EngineStream."""
        self.plan = plan
        self.choices: list[Choice] = []
        self._client = client
        self._tokenizer = tokenizer
        self._interval = interval
        self._arrived = asyncio.Event()
        self._streams: dict[Choice, EngineStream] = {}
        self._indices = [index for index in range(plan.choices) if not plan.already(index).ended]
        self._lead: Choice | None = None  # the first at the engine

    @property
    def usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=len(self.plan.prompt),
            cached_prompt_tokens=min(self._lead.cached, len(self.plan.prompt)) if self._lead is not None else 0,
            completion_tokens=sum(choice.made for choice in self.choices) + self._ended_tokens,
        )

    async def responses(self, revision: str) -> AsyncGenerator[worker_pb2.RunGenerationResponse, None]:
        """The messages of the call. Leaving early cancels every sequence. Raises MeshError."""
        with ExitStack() as sequences:
            opened = list(self._open_more(sequences))
            accepted = worker_pb2.GenerationAccepted(
                prompt_tokens=len(self.plan.prompt), max_tokens=self.plan.limits.max_tokens, model_revision=revision
            )
            yield worker_pb2.RunGenerationResponse(accepted=accepted, usage=self.usage)
            while True:
                for choice, resumed in opened:
                    if resumed is not None:
                        yield self._told(choice, resumed)
                if self._complete:
                    break
                await self._arrived.wait()
                self._arrived.clear()
                for choice in list(self._streams):
                    chunk = self._advance(choice)
                    if chunk is not None:
                        yield self._told(choice, chunk)
                    if choice.failure is not None:
                        raise choice.failure
                opened = list(self._open_more(sequences))
        yield worker_pb2.RunGenerationResponse(end=self._end(), usage=self.usage)

    def _told(self, choice: Choice, chunk: pb.Chunk) -> worker_pb2.RunGenerationResponse:
        text, ids = choice.take_skipped()
        return worker_pb2.RunGenerationResponse(chunk=chunk, usage=self.usage, skipped_text=text, skipped_token_ids=ids)

    @property
    def _ended_tokens(self) -> int:
        """Of choices that ended elsewhere."""
        return sum(already.resume_from for already in self.plan.so_far if already.ended)

    @property
    def _complete(self) -> bool:
        """Every choice is done, and the engine has said so too: it alone knows the exact times."""
        return (
            len(self.choices) == len(self._indices)
            and all(choice.done for choice in self.choices)
            and all(stream.ended for stream in self._streams.values())
        )

    def _open_more(self, sequences: ExitStack) -> Iterator[tuple[Choice, pb.Chunk | None]]:
        """Begins choices, each with what is to be sent at once of what was made elsewhere. Once the first has a token,
        or ended without one, the prompt is in the prefix cache for the others: they wait for that."""
        while len(self.choices) < len(self._indices):
            lead = self._lead
            if lead is not None and not (lead.drawn or lead.done):
                return
            choice = Choice(self._indices[len(self.choices)], self.plan, self._tokenizer)
            self.choices.append(choice)
            chunk = self._take_made(choice)
            if not choice.done:
                self._open(choice, sequences)
            yield choice, chunk

    def _take_made(self, choice: Choice) -> pb.Chunk | None:
        """What was made elsewhere passes through the choice first; returns the part that is to be sent."""
        made: list[Event] = [NewToken("", token) for token in self.plan.already(choice.index).generated]
        if len(made) >= self.plan.limits.max_tokens:
            now = time.monotonic()
            made.append(Finished(id="", reason=Finish.LENGTH, arrival=now, ended=now))
        return choice.advance(made)

    def _open(self, choice: Choice, sequences: ExitStack) -> None:
        admitted = self._lead is not None
        self._lead = self._lead or choice
        request = self.plan.submit(f"{next(_sequence_numbers)}", choice.index, admitted=admitted)
        try:
            stream = self._client.submit(request, self._arrived, interval=self._interval)
            self._streams[choice] = sequences.enter_context(stream)
        except EngineLost as error:
            raise engine_lost(error) from None

    def _advance(self, choice: Choice) -> pb.Chunk | None:
        stream, was_done = self._streams[choice], choice.done
        try:
            chunk = choice.advance(stream.take())
        except EngineLost as error:
            if was_done:  # the answer is whole; only its exact times are lost
                return None
            raise engine_lost(error) from None
        if choice.done and not was_done:
            stream.cancel()  # where a stop string ended it, the engine does not know yet
        return chunk

    def _end(self) -> worker_pb2.GenerationEnd:
        phases = max((choice.phases for choice in self.choices), key=lambda phases: phases.ended - phases.arrival)
        return worker_pb2.GenerationEnd(
            timing=pb.Timing(queue=phases.queue, prefill=phases.prefill, decode=phases.decode),
            preemptions=sum(choice.preemptions for choice in self.choices),
        )
