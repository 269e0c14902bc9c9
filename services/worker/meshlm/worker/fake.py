"""A runner without a model, for tests of everything around one. It serves only where the config names it.

It is honest about the KV cache: `run` writes each token where the block table says, and the next token is a hash of
what is *read back* through the table (and of the seed, unless greedy). A block given to two writers, freed too early
or shared with the wrong prefix therefore changes the tokens, which `expected_tokens` foretells from the prompt alone.

With a KV budget the same goes for the tokens that are left in the cache. What counts as important is the larger token.
Scores are hashes of what precedes the scored token, vectors are the bytes of a hash of all up to a position. Asked for
a verdict as Llama Guard is, it says `unsafe` of a conversation with HARM in it, and else `safe`.

Tokens 0 to 255 are bytes, END is the end of sequence. A prompt with one of the FAULTS in it makes the runner fail
when it draws that sequence's fourth token.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from hashlib import blake2b

from meshlm.worker.engine.sequence import (
    NON_FINITE,
    Chunk,
    ChunkPool,
    ChunkScores,
    Outcome,
    Sampled,
    Sequence,
    StepOutOfMemory,
    scored_positions,
)
from meshlm.worker.messages import ModelFacts, Sampling, TokenLogprob

END = 256
VOCAB_SIZE = 257
LETTERS = b"abcdefghijklmnopqrstuvwxyz     ."
FAULTY_AT = 3  # output tokens before a fault strikes
WIDTH = 8  # of the vectors
OBSERVED = 32  # the latest tokens, which compaction keeps

HANG = b"!hang"
CRASH = b"!crash"
KILL = b"!kill"
OUT_OF_MEMORY = b"!oom"
BROKEN = b"!nan"  # weights or a device that give what is no number
FAULTS = (HANG, CRASH, KILL, OUT_OF_MEMORY)

HARM = b"!harm"
JUDGED = b"<END CONVERSATION>"  # what a prompt that asks for a verdict has in it
SURE = 0.999  # the likelihood of the verdict that it gives


@dataclass(frozen=True, kw_only=True)
class FakeSettings:
    """The size and pace of the fake."""

    # Blocks of its KV cache.
    total_blocks: int = 512
    # Tokens of a block.
    block_size: int = 16
    # Most tokens of a sequence.
    max_context: int = 2048
    # Seconds that a step takes.
    step_seconds: float = 0.0
    # END is drawn about once in so many tokens; 0: never.
    end_one_in: int = 0
    # What every answer says, and then ends; empty: letters that follow from the prompt.
    text: str = ""
    # What it takes off every log-probability that it tells, nats: as a worker that computes wrongly.
    logprob_error: float = 0.0


def next_token(context: bytes, sampling: Sampling, end_one_in: int = 0) -> int:
    """The token after `context` (token ids as little-endian 16-bit words)."""
    seed = 0 if sampling.temperature == 0 else sampling.seed
    word = int.from_bytes(
        blake2b(context, digest_size=8, salt=seed.to_bytes(16, "little", signed=True)).digest(), "little"
    )
    if end_one_in and word % end_one_in == 0:
        return END
    return LETTERS[(word >> 32) % len(LETTERS)]


def expected_tokens(prompt: list[int], sampling: Sampling, count: int, end_one_in: int = 0) -> list[int]:
    """The first `count` tokens that a FakeRunner draws behind `prompt`, whatever else it does."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(next_token(_words(tokens), sampling, end_one_in))
    return tokens[len(prompt) :]


def expected_logprob(before: list[int]) -> float:
    """What a FakeRunner gives as the log-probability of any token behind `before`; the entropy is its negative."""
    return _logprob(_words(before))


def expected_vector(tokens: list[int]) -> list[float]:
    """A FakeRunner's final hidden state at the last of `tokens`: (WIDTH,), whole numbers."""
    return _vector(_words(tokens))


def _logprob(context: bytes, token: int | None = None) -> float:
    """Of `token` behind `context`: of the first letter of a verdict where one is asked for, else of any token."""
    read = context[::2]
    if token in (ord("s"), ord("u")) and JUDGED in read and (read[-2:] == b"\n\n" or read[-1:] == b">"):
        return math.log(SURE if (token == ord("u")) == (HARM in read) else 1 - SURE)
    return -int.from_bytes(blake2b(context, digest_size=2).digest(), "little") / 4096


def _vector(context: bytes) -> list[float]:
    return [float(byte) for byte in blake2b(context, digest_size=WIDTH).digest()]


def important(tokens: list[int], keep: int) -> list[int]:
    """The indices of the `keep` tokens that a FakeRunner keeps: the latest OBSERVED of them, then larger before smaller
    tokens and earlier before later ones."""
    latest = range(max(0, len(tokens) - min(OBSERVED, keep)), len(tokens))
    others = sorted(range(latest.start), key=lambda index: (-tokens[index], index))
    return sorted([*others[: keep - len(latest)], *latest])


def _words(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(2, "little") for token in tokens)


class FakeRunner:
    """Satisfies `engine.sequence.Runner`."""

    def __init__(self, settings: FakeSettings) -> None:
        self._settings = settings
        self._memory = [bytearray(2 * settings.block_size) for _ in range(settings.total_blocks)]
        self._struck: set[str] = set()
        self.facts = ModelFacts(
            architecture="fake",
            vocab_size=VOCAB_SIZE,
            max_context=settings.max_context,
            block_size=settings.block_size,
            total_blocks=settings.total_blocks,
            weight_bytes=0,
            kv_bytes=2 * settings.block_size * settings.total_blocks,
            quantization="none",
            parameters=0,
            chunk_invariant=True,
            kv_budgets=True,
            hidden_size=WIDTH,
            engine="fake",
        )

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """See `Runner.run`."""
        if self._settings.step_seconds:
            time.sleep(self._settings.step_seconds)
        for chunk in chunks:
            self._strike(chunk.sequence)
        for chunk in chunks:
            self._write(chunk)
        return [self._outcome(chunk) for chunk in chunks]

    def compact(self, sequence: Sequence, keep: int) -> None:
        """See `Runner.compact`."""
        words = self._read(sequence, sequence.computed)
        cached = [int.from_bytes(words[i : i + 2], "little") for i in range(0, len(words), 2)]
        for index, kept in enumerate(important(cached, keep)):
            self._store(sequence, index, cached[kept])

    def forget(self, sequence: Sequence) -> None:
        """The fake has no per-sequence state."""

    def _write(self, chunk: Chunk) -> None:
        for position in range(chunk.start, chunk.start + chunk.count):
            self._store(chunk.sequence, position - chunk.sequence.evicted, chunk.sequence.tokens[position])

    def _store(self, sequence: Sequence, index: int, token: int) -> None:
        size = self._settings.block_size
        slot = 2 * (index % size)
        self._memory[sequence.blocks[index // size]][slot : slot + 2] = token.to_bytes(2, "little")

    def _read(self, sequence: Sequence, end: int) -> bytes:
        """The words of the cached tokens before position `end`."""
        return b"".join(self._memory[block] for block in sequence.blocks)[: 2 * (end - sequence.evicted)]

    def _outcome(self, chunk: Chunk) -> Outcome:
        sequence, request = chunk.sequence, chunk.sequence.request
        context = self._read(sequence, chunk.start + chunk.count)
        if BROKEN in bytes(token for token in request.prompt if token < END) and sequence.output_length >= FAULTY_AT:
            return NON_FINITE
        if request.score_from is not None:
            ends = range(*scored_positions(chunk))
            true = [_logprob(context[: 2 * (end - sequence.evicted)], sequence.tokens[end]) for end in ends]
            return ChunkScores([self._told(logprob) for logprob in true], [-logprob for logprob in true])
        if request.pool is not None:
            first = len(context) // 2 - (chunk.count if request.pool == "mean" else 1)
            vectors = [_vector(context[: 2 * (end + 1)]) for end in range(first, len(context) // 2)]
            return ChunkPool([sum(column) for column in zip(*vectors, strict=True)])
        return self._draw(sequence, context) if chunk.sample else None

    def _told(self, logprob: float) -> float:
        return logprob - self._settings.logprob_error

    def _draw(self, sequence: Sequence, context: bytes) -> Sampled:
        sampling = sequence.request.sampling
        if self._settings.text:
            token = [*self._settings.text.encode(), END][min(sequence.output_length, len(self._settings.text.encode()))]
        else:
            token = next_token(context, sampling, self._settings.end_one_in)
        if sampling.logprobs is None:
            return Sampled(token)
        top = tuple(TokenLogprob((token + i) % VOCAB_SIZE, -1.0 - i) for i in range(sampling.logprobs))
        return Sampled(token, self._told(_logprob(context, token)), top)

    def _strike(self, sequence: Sequence) -> None:
        if sequence.output_length != FAULTY_AT or sequence.id in self._struck:
            return
        prompt = bytes(token for token in sequence.request.prompt if token < END)
        fault = next((fault for fault in FAULTS if fault in prompt), None)
        if fault is None:
            return
        self._struck.add(sequence.id)
        if fault == HANG:
            time.sleep(3600)
        elif fault == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault == CRASH:
            raise RuntimeError("the fake runner was told to crash")
        else:
            raise StepOutOfMemory
