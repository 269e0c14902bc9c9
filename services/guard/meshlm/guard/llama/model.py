"""One model behind workers: from a prompt to a verdict with its score, by scores alone; the model writes nothing.

One request scores the first tokens of `safe` and `unsafe` behind the same prompt. Where that says `unsafe`, categories
are decoded by further scores. The worker's prefix cache keeps the fixed part of the prompt, and a conversation while it
grows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from meshlm.chassis import telemetry
from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name
from meshlm.guard.llama.config import Asking, LlamaGuardConfig
from meshlm.guard.llama.decoding import Grammar, Tokens, decode
from meshlm.guard.llama.grammar import Continuation, batches, learn
from meshlm.guard.llama.prompts import VERSIONS, Prompt, Role, chosen
from meshlm.guard.llama.verdicts import VerdictError, parse
from meshlm.guard.llama.workers import Replica
from meshlm.v1 import generation_pb2, worker_pb2

# A log-probability is at most 0, but for rounding.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Caller:
    """For whom a prompt is judged."""

    tenant: str
    request_id: str


@dataclass(frozen=True)
class Judged:
    """A verdict on a prompt."""

    # Calibrated probability that it is harmful. Range [0, 1].
    score: float
    # Llama Guard 3's codes, the likeliest first; where the score is below `category_score`, none.
    categories: tuple[str, ...]
    # Digest of the weights that said so.
    revision: str


class JudgingModel:
    """Reentrant."""

    def __init__(self, name: str, asking: Asking, config: LlamaGuardConfig) -> None:
        """`asking`: how this model is asked; `config`: what goes for all. Raises ValueError where no category is left
        to ask about.
        """
        self.name = name
        self._asking = asking
        self._config = config
        self._version = VERSIONS[asking.wording(name)]
        self._categories = chosen(self._version, config.categories, config.excluded)
        if not self._categories:
            raise ValueError("excluded: no category is left")
        self._renumbered = {} if config.categories else self._version.renumbered
        self._grammars: dict[str, Grammar] = {}  # by revision
        self.label = f"{self._version.name}:{name}"
        self.version = f"{self.label}-{self._digest()}"
        meter = telemetry.meter()
        self._tokens = meter.create_counter(Name.GUARD_MODEL_TOKENS, "{token}", "Tokens read for verdicts")
        self._seconds = meter.create_histogram(Name.GUARD_MODEL_DURATION, "s", "Time to one verdict of a model")

    def prompt(self, turns: Sequence[tuple[Role, str]]) -> Prompt:
        """What asks about the last of the turns."""
        return self._version.prompt(self._categories, turns)

    async def grammar(self, replica: Replica) -> Grammar:
        """Of the weights that the replica serves now. Raises JudgeError, and MeshError as Score does."""
        revision = replica.revision
        known = self._grammars.get(revision)
        if known is None:

            async def ask(continuations: Sequence[Continuation]) -> list[Tokens]:
                pieces = [worker_pb2.PromptPiece(text="\n\n")]
                request = worker_pb2.ScoreRequest(model=self.name, pieces=pieces, continuations=continuations)
                return [tuple(scored.token_ids) for scored in (await replica.score(request)).scored]

            known = self._grammars[revision] = await learn(tuple(self._categories), ask)
        return known

    async def judge(self, prompt: Prompt, replica: Replica, caller: Caller) -> Judged:
        """Raises VerdictError for what is no verdict, JudgeError, and MeshError."""
        begun, revision = time.perf_counter(), replica.revision
        grammar = await self.grammar(replica)
        reading = _Reading(self._request(prompt, caller), replica, revision)
        safe, unsafe = await reading.score(grammar.lead, (grammar.safe, grammar.unsafe))
        score = self._calibrated(safe, unsafe)
        categories: tuple[str, ...] = ()
        if score >= self._config.category_score:
            verdict = parse(await reading.text(await decode(grammar, reading.score)), self._categories)
            categories = tuple(self._renumbered.get(code, code) for code in verdict.categories)
        self._seconds.record(time.perf_counter() - begun, {Name.GUARD_MODEL: self.name})
        self._tokens.add(reading.tokens - reading.cached, {Name.GUARD_MODEL: self.name, Name.GUARD_CACHED: False})
        self._tokens.add(reading.cached, {Name.GUARD_MODEL: self.name, Name.GUARD_CACHED: True})
        return Judged(score, categories, revision)

    def _calibrated(self, safe: float, unsafe: float) -> float:
        """From two log-probabilities. Raises VerdictError."""
        if not all(math.isfinite(value) and value <= _ROUNDING for value in (safe, unsafe)):
            raise VerdictError("no probabilities")
        if math.exp(safe) + math.exp(unsafe) < self._asking.least_mass:
            raise VerdictError("it would say neither `safe` nor `unsafe`")
        log_odds = (unsafe - safe) / self._asking.temperature + self._asking.offset
        return 1.0 / (1.0 + math.exp(-max(-500.0, min(500.0, log_odds))))

    def _request(self, prompt: Prompt, caller: Caller) -> worker_pb2.ScoreRequest:
        salt = "guard" if self._config.prefix_cache == "all" else f"guard:{caller.tenant}"
        request = worker_pb2.ScoreRequest(
            request_id=caller.request_id,
            model=self.name,
            return_text_offsets=True,
            # A person waits for what is judged.
            priority=generation_pb2.PRIORITY_CRITICAL,
            tenant=caller.tenant,
            cache_salt=salt.encode(),
        )
        if prompt.chat:
            request.input.chat.messages.add(role="user", content=_encodable(prompt.text))
        else:
            request.pieces.extend(
                worker_pb2.PromptPiece(text=_encodable(piece.text), control_tokens=piece.control)
                for piece in prompt.pieces
            )
        return request

    def _digest(self) -> str:
        """Of all that scores and categories depend on, but for the weights."""
        content = [
            dataclasses.asdict(self._asking), self._categories, self._version.name, self._config.segment_chars,
            self._config.context_chars, self._config.category_score,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


class _Reading:
    """A prompt at a worker, and what the model there says of tokens behind it."""

    def __init__(self, request: worker_pb2.ScoreRequest, replica: Replica, revision: str) -> None:
        self._request = request
        self._replica = replica
        self._revision = revision
        self._texts: dict[Tokens, str] = {}
        self.tokens = 0  # read so far
        self.cached = 0  # of them, found in the prefix cache

    async def score(self, behind: Sequence[int], options: Sequence[int]) -> list[float]:
        """The log-probability of each token behind the prompt and the tokens `behind`. Raises MeshError."""
        asked = [_tokens((*behind, option)) for option in options]
        return [scored.logprobs[-1] for batch in batches(asked) for scored in await self._ask(batch)]

    async def text(self, tokens: Tokens) -> str:
        """What these tokens behind the prompt spell. Raises MeshError."""
        if tokens not in self._texts:
            (scored,) = await self._ask([_tokens(tokens)])
            self._texts[tokens] = scored.text
        return self._texts[tokens]

    async def _ask(self, continuations: Sequence[Continuation]) -> Sequence[worker_pb2.ScoredText]:
        request = worker_pb2.ScoreRequest()
        request.CopyFrom(self._request)
        request.continuations.extend(continuations)
        response = await self._replica.score(request)
        if response.model_revision != self._revision:
            raise MeshError(Reason.NO_REPLICA, "the worker has another model now")
        if [tuple(scored.token_ids) for scored in response.scored] != [tuple(c.token_ids.ids) for c in continuations]:
            raise MeshError(Reason.INTERNAL, "the worker answers another question")
        for scored in response.scored:
            if len(scored.logprobs) != len(scored.token_ids) or len(scored.text_offsets) != len(scored.token_ids):
                raise MeshError(Reason.INTERNAL, "the worker answers half a question")
            self._texts[tuple(scored.token_ids[:-1])] = scored.text[: scored.text_offsets[-1]]
        self.tokens += response.usage.prompt_tokens
        self.cached += response.usage.cached_prompt_tokens
        return response.scored


def _tokens(ids: Sequence[int]) -> Continuation:
    return Continuation(token_ids=generation_pb2.TokenIds(ids=ids))


def _encodable(text: str) -> str:
    """Lone surrogates, which no message can carry, as U+FFFD."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
