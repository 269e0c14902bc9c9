"""Runs a native decoder over the chunks of a step. Nothing is allocated here for a token that could be kept."""

from __future__ import annotations

import ctypes
import struct
from array import array

import numpy as np
from numpy.typing import NDArray

from meshlm.kernels.native import structures as c
from meshlm.kernels.native.cache import POOLING, compact
from meshlm.kernels.native.memory import ALIGNMENT
from meshlm.worker.engine.adjustments import Adjustments
from meshlm.worker.engine.budgets import OBSERVED
from meshlm.worker.engine.draws import adjusts, told, uniform
from meshlm.worker.engine.sequence import (
    Chunk,
    ChunkPool,
    ChunkScores,
    NonFinite,
    Outcome,
    Sampled,
    Sequence,
    StepOutOfMemory,
    scored_positions,
)
from meshlm.worker.messages import ModelFacts
from meshlm.worker.models.native_decoder import NativeDecoder

_SPAN = struct.Struct("<iiiiqqiiq")
_DRAW = struct.Struct("<fffid")
_SCORE = struct.Struct("<iiff")


class NativeRunner:
    """The `Runner` of the engine on a CPU. Not thread-safe: one engine calls it.

    A position gets the same bits whichever chunk computes it and whatever runs beside it.
    """

    def __init__(self, decoder: NativeDecoder, facts: ModelFacts, *, max_rows: int, max_outputs: int) -> None:
        """max_rows: tokens of a step; max_outputs: sequences of a step."""
        self._decoder = decoder
        self._facts = facts
        self._adjustments = Adjustments()
        self._logits = _aligned(max_outputs, facts.vocab_size)
        self._spans = bytearray(_SPAN.size * max_rows)
        self._draws = bytearray(_DRAW.size * max_outputs)
        self._drawn = np.empty(max_outputs, np.int32)
        self._max_rows, self._max_outputs = max_rows, max_outputs
        types = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._sample = decoder.cache.library.function("native_sample", None, *types)
        self._step = c.Step(
            span=_address(self._spans),
            logits=self._logits.ctypes.data,
            drawn=self._drawn.ctypes.data,
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def decoder(self) -> NativeDecoder:
        return self._decoder

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """See `Runner.run`."""
        drawing = [chunk.sequence for chunk in chunks if chunk.sample]
        careful = any(adjusts(sequence) for sequence in drawing)
        tasks = _Tasks(chunks, self._decoder.config.hidden_size)
        self._run(chunks, drawing, tasks, draw=bool(drawing) and not careful)
        sampled = iter(self._draw_carefully(drawing) if careful else self._drawn_tokens(len(drawing)))
        return [next(sampled) if chunk.sample else tasks.outcome(chunk) for chunk in chunks]

    def logits(self, chunks: list[Chunk]) -> NDArray[np.float32]:
        """Store keys and values of the chunks; logits of those that sample, in order: (samples, vocab) float32."""
        drawing = [chunk.sequence for chunk in chunks if chunk.sample]
        self._run(chunks, drawing, _Tasks([], 0), draw=False)
        return self._logits[: len(drawing)].copy()

    def compact(self, sequence: Sequence, keep: int) -> None:
        """See `Runner.compact`."""
        decoder, prefilling = self._decoder, sequence.computed <= sequence.prompt_length
        compact(
            decoder.pool,
            decoder.cache.struct,
            sequence.blocks,
            sequence.computed - sequence.evicted,
            keep=keep,
            recent=min(OBSERVED, keep),
            scores=decoder.importance,
            pooling=POOLING if prefilling else 1,
        )

    def forget(self, sequence: Sequence) -> None:
        self._adjustments.forget(sequence)

    # One step

    def _run(self, chunks: list[Chunk], drawing: list[Sequence], tasks: _Tasks, *, draw: bool) -> None:
        rows = sum(chunk.count for chunk in chunks)
        if rows > self._max_rows or len(drawing) > self._max_outputs:
            raise ValueError(f"{rows} rows and {len(drawing)} draws; at most {self._max_rows}, {self._max_outputs}")
        # Arrays live until the call below returns; their addresses are taken when they have their final size.
        tokens, tables, outputs = array("i"), array("i"), array("i")
        for chunk in chunks:
            tokens.extend(chunk.sequence.tokens[chunk.start : chunk.start + chunk.count])
            tables.extend(chunk.sequence.blocks)
        self._fill_spans(chunks, tables.buffer_info()[0], outputs)
        if draw:
            self._fill_draws(drawing)
        step = self._step
        step.rows, step.spans, step.tokens = rows, len(chunks), tokens.buffer_info()[0]
        step.outputs, step.output_rows = len(outputs), outputs.buffer_info()[0]
        step.draw = _address(self._draws) if draw else None
        step.scores, step.score = tasks.scores, tasks.score_address
        step.pools, step.pool = tasks.pools, tasks.pool_address
        try:
            self._decoder.step(step)
        except MemoryError as error:
            raise StepOutOfMemory(str(error)) from error

    def _fill_spans(self, chunks: list[Chunk], table: int, outputs: array[int]) -> None:
        row = 0
        for number, chunk in enumerate(chunks):
            sequence, start, count = chunk.sequence, chunk.start, chunk.count
            budget = sequence.request.kv
            sinks = observe = 0
            index = start - sequence.evicted
            if budget is not None and budget.policy == "importance":
                observe = self._observe(chunk)
            elif budget is not None and sequence.evicted:
                size = self._facts.block_size
                sinks = -(-budget.sinks // size) * size
            _SPAN.pack_into(
                self._spans, number * _SPAN.size, row, count, index, sinks, start, index, observe, 0, table
            )  # fmt: skip
            table += 4 * len(sequence.blocks)
            row += count
            if chunk.sample:
                outputs.append(row - 1)

    def _observe(self, chunk: Chunk) -> int:
        """How many last queries of a chunk say which tokens matter: of a prompt those of its last chunk alone (SnapKV's
        observation window), for which the scores begin at zero, and all behind it."""
        sequence, end = chunk.sequence, chunk.start + chunk.count
        if end < sequence.prompt_length:
            return 0
        if chunk.start < sequence.prompt_length:  # the chunks before this one were not observed: their scores are void
            self._decoder.importance[:, sequence.blocks] = 0.0
        return min(OBSERVED, chunk.count)

    def _fill_draws(self, drawing: list[Sequence]) -> None:
        for number, sequence in enumerate(drawing):
            sampling = sequence.request.sampling
            number_in_unit = uniform(sampling.seed, sequence.output_length) if sampling.temperature > 0 else 0.0
            _DRAW.pack_into(
                self._draws,
                number * _DRAW.size,
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.top_k,
                number_in_unit,
            )

    def _drawn_tokens(self, count: int) -> list[Sampled | NonFinite]:
        return told(self._drawn[:count].tolist(), {})

    def _draw_carefully(self, drawing: list[Sequence]) -> list[Sampled | NonFinite]:
        """Where some ask for penalties, bias or log-probabilities: these in numpy, then the same native draw."""
        reports = self._adjustments.prepare(self._logits[: len(drawing)], drawing)
        self._fill_draws(drawing)
        self._sample(
            self._logits.ctypes.data,
            len(drawing),
            self._facts.vocab_size,
            _address(self._draws),
            self._drawn.ctypes.data,
        )
        return told(self._drawn[: len(drawing)].tolist(), reports)


class _Tasks:
    """What the chunks of texts to score or to embed want, and got."""

    def __init__(self, chunks: list[Chunk], width: int) -> None:
        self._scores = bytearray()
        self._sums: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
        self._places: dict[int, tuple[int, int]] = {}  # by chunk: its scores from where to where, or its sum
        pools: list[c.PoolRows] = []
        row = 0
        for chunk in chunks:
            request = chunk.sequence.request
            if request.score_from is not None:
                first = len(self._scores) // _SCORE.size
                for position in range(*scored_positions(chunk)):
                    target = chunk.sequence.tokens[position]
                    self._scores += _SCORE.pack(row + position - 1 - chunk.start, target, 0.0, 0.0)
                self._places[id(chunk)] = first, len(self._scores) // _SCORE.size
            elif request.pool is not None:
                self._places[id(chunk)] = len(self._sums), 0
                self._sums.append(np.zeros(width))
                offset, count = (0, chunk.count) if request.pool == "mean" else (chunk.count - 1, 1)
                pools.append(c.PoolRows(row + offset, count, self._sums[-1].ctypes.data))
            row += chunk.count
        self._pools = (c.PoolRows * len(pools))(*pools) if pools else None
        self.scores, self.pools = len(self._scores) // _SCORE.size, len(pools)

    @property
    def score_address(self) -> int | None:
        return _address(self._scores) if self._scores else None

    @property
    def pool_address(self) -> int | None:
        return None if self._pools is None else ctypes.addressof(self._pools)

    def outcome(self, chunk: Chunk) -> Outcome:
        if chunk.sequence.request.score_from is not None:
            first, end = self._places[id(chunk)]
            part = memoryview(self._scores)[first * _SCORE.size : end * _SCORE.size]
            rows = list(_SCORE.iter_unpack(part))
            return ChunkScores([row[2] for row in rows], [row[3] for row in rows])
        if chunk.sequence.request.pool is not None:
            return ChunkPool(self._sums[self._places[id(chunk)][0]].tolist())
        return None


def _aligned(rows: int, columns: int) -> NDArray[np.float32]:
    """Floats that begin on a cache line: rows of whole lines are then written past the caches (`Decoder::streamed`)."""
    raw = np.empty(rows * columns * 4 + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + rows * columns * 4].view(np.float32).reshape(rows, columns)


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
