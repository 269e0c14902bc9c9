"""What a stream tells, as plain typed events. Nouns inside them are the contract's own messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshlm.v1 import generation_pb2, inference_pb2


@dataclass(frozen=True)
class Start:
    """The stream's first event."""

    request_id: str
    trace_id: str
    routing: inference_pb2.RoutingDecision
    input_verdict: generation_pb2.Verdict
    limits: inference_pb2.LimitState | None
    # Tokens that came before this stream, over all choices: above 0 after a resume.
    offset: int = 0
    # The seed in use: with it, the same request gives the same tokens. None for greedy ones and cached answers.
    seed: int | None = None
    # How far the request was trusted; None where that is not looked at.
    admission: inference_pb2.Admission | None = None


@dataclass(frozen=True)
class Text:
    """More of one choice's answer."""

    text: str
    choice: int
    # Offset of the first of these tokens in the choice's output, and their number.
    token_offset: int
    token_count: int
    token_ids: Sequence[int]
    logprobs: Sequence[generation_pb2.PositionLogprobs]
    # Tokens billed so far, over all choices, and over all parts of a stream that was resumed.
    usage: generation_pb2.Usage


@dataclass(frozen=True)
class Moderated:
    """What the guard says of one choice's answer. Offsets are characters of the choice's text, from its beginning."""

    choice: int
    # `pass`: the text up to `check_offset` was judged, and stands. `retract`: the range was told as `Text` and should
    # not have been: take it back from whoever saw it. `stop`: the choice ends before the text that this is about.
    action: str
    check_offset: int
    char_start: int
    char_end: int
    categories: Sequence[str]
    # Confidence of the strongest finding. Range [0, 1].
    score: float


@dataclass(frozen=True)
class End:
    """The stream's last event."""

    usage: generation_pb2.Usage
    timing: generation_pb2.Timing
    # By choice: `stop`, `length`, `content_filter` or `budget_spent`.
    finish_reasons: Mapping[int, str]
    # By choice, where a stop string or token ended it.
    matched_stops: Mapping[int, str]
    output_verdicts: Sequence[generation_pb2.Verdict]
    cost_micros: int | None
    # Replicas that computed the answer, in order: more than one where a worker was lost.
    replicas: Sequence[str] = ()


Event = Start | Text | Moderated | End


@dataclass(frozen=True)
class ChoiceAnswer:
    """One whole answer."""

    text: str
    finish_reason: str
    token_ids: Sequence[int]
    logprobs: Sequence[generation_pb2.PositionLogprobs]


@dataclass(frozen=True)
class Answer:
    """A whole generation: its choices between the start and the end of their stream."""

    choices: Sequence[ChoiceAnswer]
    start: Start
    end: End

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


@dataclass
class StreamReader:
    """Turns a stream's messages into events, and remembers how far each choice got."""

    # Where the next message of each choice would go on.
    next_offsets: dict[int, int] = field(default_factory=dict)
    start: Start | None = None
    usage: generation_pb2.Usage = field(default_factory=generation_pb2.Usage)  # as this stream told last
    before: generation_pb2.Usage = field(default_factory=generation_pb2.Usage)  # of the streams that broke
    finish_reasons: dict[int, str] = field(default_factory=dict)
    matched_stops: dict[int, str] = field(default_factory=dict)

    def read(self, message: inference_pb2.StreamGenerateResponse) -> Event | None:
        """The event that a message tells; None for one that only moves the usage."""
        kind = message.WhichOneof("event")
        self.usage = message.usage
        if kind == "start":
            self.start = start_of(message.start, sum(self.next_offsets.values()))
            return self.start
        if kind == "end":
            return end_of(message.end, self._total(), self.finish_reasons, self.matched_stops)
        if kind == "chunk":
            return self._text(message.chunk, self._total())
        if kind == "moderation":
            return moderated_of(message.moderation)
        return None

    def resume(self, request: inference_pb2.StreamGenerateRequest) -> None:
        """Make the request of a stream that broke one that goes on with it."""
        if request.generation.sampling.n > 1:
            choices = range(request.generation.sampling.n)
            request.resume_from_choices[:] = [self.next_offsets.get(choice, 0) for choice in choices]
        else:
            request.resume_from = self.next_offsets.get(0, 0)
        if self.start is None:
            return
        request.resume_of = self.start.request_id
        if self.start.seed is not None:  # so that it can be made anew where what was made is lost
            request.generation.sampling.seed = self.start.seed
        self.before, self.usage = self._total(), generation_pb2.Usage()

    def _total(self) -> generation_pb2.Usage:
        if not self.before.prompt_tokens:
            return self.usage
        return generation_pb2.Usage(
            prompt_tokens=self.before.prompt_tokens + self.usage.prompt_tokens,
            cached_prompt_tokens=self.before.cached_prompt_tokens + self.usage.cached_prompt_tokens,
            completion_tokens=self.before.completion_tokens + self.usage.completion_tokens,
        )

    def _text(self, chunk: generation_pb2.Chunk, usage: generation_pb2.Usage) -> Text | None:
        self.next_offsets[chunk.choice] = chunk.token_offset + chunk.token_count
        if chunk.finish_reason:
            self.finish_reasons[chunk.choice] = finish_name(chunk.finish_reason)
            if chunk.HasField("matched_stop"):
                self.matched_stops[chunk.choice] = chunk.matched_stop
        if not (chunk.text or chunk.token_count):
            return None
        return Text(
            chunk.text,
            chunk.choice,
            chunk.token_offset,
            chunk.token_count,
            tuple(chunk.token_ids),
            tuple(chunk.logprobs),
            usage,
        )


def start_of(message: inference_pb2.StreamStart, offset: int = 0) -> Start:
    """The event for a stream's first message."""
    limits = message.limits if message.HasField("limits") else None
    seed = message.seed if message.HasField("seed") else None
    admission = message.admission if message.HasField("admission") else None
    routing, verdict = message.routing, message.input_verdict
    return Start(message.request_id, message.trace_id, routing, verdict, limits, offset, seed, admission)


def moderated_of(message: inference_pb2.Moderation) -> Moderated:
    """The event for the guard's word on an answer."""
    return Moderated(
        choice=message.choice,
        action=inference_pb2.Moderation.Action.Name(message.action).removeprefix("ACTION_").lower(),
        check_offset=message.check_offset,
        char_start=message.char_start,
        char_end=message.char_end,
        categories=tuple(message.categories),
        score=message.score,
    )


def end_of(
    message: inference_pb2.StreamEnd,
    usage: generation_pb2.Usage,
    finish_reasons: Mapping[int, str],
    matched_stops: Mapping[int, str],
) -> End:
    """The event for a stream's last message."""
    cost = message.cost_micros if message.HasField("cost_micros") else None
    verdicts = tuple(message.output_verdicts)
    return End(usage, message.timing, finish_reasons, matched_stops, verdicts, cost, tuple(message.replicas))


def answer_of(message: inference_pb2.GenerateResponse) -> Answer:
    """A unary answer in the same terms."""
    reasons = {choice.index: finish_name(choice.finish_reason) for choice in message.choices}
    stops = {choice.index: choice.matched_stop for choice in message.choices if choice.HasField("matched_stop")}
    choices = tuple(
        ChoiceAnswer(choice.text, finish_name(choice.finish_reason), tuple(choice.token_ids), tuple(choice.logprobs))
        for choice in sorted(message.choices, key=lambda choice: choice.index)
    )
    return Answer(choices, start_of(message.start), end_of(message.end, message.usage, reasons, stops))


def finish_name(reason: generation_pb2.FinishReason.ValueType) -> str:
    """`FINISH_REASON_STOP` as `stop`."""
    return generation_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
