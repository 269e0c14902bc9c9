"""Runs a torch model over the chunks of a step: flat batch in, tokens out."""

from __future__ import annotations

import torch

from meshlm.kernels.kv_cache import allocate_kv_cache
from meshlm.kernels.paged_attention import DecodeGroup, plan_decode
from meshlm.kernels.prefill_attention import padded_blocks
from meshlm.worker.engine.sampler import Sampler
from meshlm.worker.engine.sequence import (
    Chunk,
    ChunkPool,
    ChunkScores,
    Outcome,
    Sequence,
    StepOutOfMemory,
    scored_positions,
)
from meshlm.worker.messages import ModelFacts
from meshlm.worker.models.batch import Batch, PrefillSpan
from meshlm.worker.models.torch_decoder import TorchDecoder


class TorchRunner:
    """The `Runner` of the engine on a CPU or a CUDA device. Not thread-safe: one engine calls it."""

    def __init__(
        self,
        model: TorchDecoder,
        facts: ModelFacts,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        config = model.config
        self._model = model
        self._facts = facts
        self._dtype = dtype
        self._device = device
        self._sampler = Sampler()
        self._cache = allocate_kv_cache(
            config.layers, config.kv_heads, facts.total_blocks, facts.block_size, config.head_dim, dtype, device
        )

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    def run(self, chunks: list[Chunk]) -> list[Outcome]:
        """See `Runner.run`. A step that fails leaves nothing the scheduler could see: what it wrote are slots beyond
        each sequence's `computed`, which the next try overwrites."""
        try:
            return self._run(chunks)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise StepOutOfMemory(str(error)) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error) or "not enough memory" in str(error):  # torch's CPU allocator
                raise StepOutOfMemory(str(error)) from error
            raise

    @torch.inference_mode()
    def logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """Store keys and values of the chunks; logits of those that sample, in order: (samples, vocab) float32."""
        return self._model.forward(self._batch(chunks), self._cache)

    def compact(self, sequence: Sequence, keep: int) -> None:
        """Never called: `facts.kv_budgets` is false."""
        raise NotImplementedError("KV budgets are the native engine's")

    @torch.inference_mode()
    def _run(self, chunks: list[Chunk]) -> list[Outcome]:
        batch = self._batch(chunks)
        residual = self._model.residual(batch, self._cache)
        drawing = [chunk.sequence for chunk in chunks if chunk.sample]
        logits = self._model.logits(residual.index_select(0, batch.rows)) if drawing else residual
        sampled = iter(self._sampler.sample(logits, drawing) if drawing else ())
        spans = iter(batch.prefill)  # in the order of the chunks
        outcomes: list[Outcome] = []
        for chunk in chunks:
            span = next(spans) if chunk.start < _output_positions(chunk)[0] else None
            if chunk.sample:
                outcomes.append(next(sampled))
            else:
                outcomes.append(None if span is None else self._told(chunk, residual[span.row : span.row + span.count]))
        return outcomes

    def _told(self, chunk: Chunk, residual: torch.Tensor) -> Outcome:
        """What a chunk that does not sample has to tell. residual: (count, width), its rows."""
        request = chunk.sequence.request
        if request.score_from is not None:
            first, end = scored_positions(chunk)
            logprobs = torch.log_softmax(
                self._model.logits(residual[first - 1 - chunk.start : end - 1 - chunk.start]), -1
            )
            targets = self._tensor(chunk.sequence.tokens[first:end]).unsqueeze(1)
            entropies = torch.special.entr(logprobs.exp()).sum(-1)
            return ChunkScores(logprobs.gather(1, targets).squeeze(1).tolist(), entropies.tolist())
        if request.pool is not None:
            hidden = self._model.normed(residual).double()
            return ChunkPool((hidden.sum(0) if request.pool == "mean" else hidden[-1]).tolist())
        return None

    def forget(self, sequence: Sequence) -> None:
        self._sampler.forget(sequence)

    def _batch(self, chunks: list[Chunk]) -> Batch:
        """Prompt positions go the prefill way, output positions the decode way, however many of them there are.

        Which kernel computes a position must not depend on how the scheduler cut the prompt, nor on whether a
        preempted sequence is computed anew: the last bit of a sum can become another token.
        """
        single = sorted(
            ((p, chunk.sequence) for chunk in chunks for p in range(*_output_positions(chunk))), key=lambda row: row[0]
        )
        row_of = {(sequence.id, position): row for row, (position, sequence) in enumerate(single)}
        tokens = [sequence.tokens[position] for position, sequence in single]
        positions = [position for position, _ in single]
        slots = [self._slot(sequence, position) for position, sequence in single]
        spans: list[PrefillSpan] = []
        for chunk in chunks:
            sequence, end = chunk.sequence, _output_positions(chunk)[0]
            if chunk.start < end:
                blocks = self._tensor(padded_blocks(sequence.blocks, end, self._facts.block_size))
                spans.append(PrefillSpan(len(tokens), end - chunk.start, chunk.start, blocks))
                tokens += sequence.tokens[chunk.start : end]
                positions += range(chunk.start, end)
                slots += [self._slot(sequence, position) for position in range(chunk.start, end)]
                row_of[sequence.id, end - 1] = len(tokens) - 1
        rows = [row_of[chunk.sequence.id, chunk.start + chunk.count - 1] for chunk in chunks if chunk.sample]
        return Batch(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            rows=self._tensor(rows),
            decode=self._decode_groups(single, None),
            prefill=tuple(spans),
            windowed={window: self._decode_groups(single, window) for window in self._model.windows},
        )

    def _slot(self, sequence: Sequence, position: int) -> int:
        size = self._facts.block_size
        return sequence.blocks[position // size] * size + position % size

    def _decode_groups(self, rows: list[tuple[int, Sequence]], window: int | None) -> tuple[DecodeGroup, ...]:
        tables = [sequence.blocks for _, sequence in rows]
        lengths = [position + 1 for position, _ in rows]
        kv_heads = self._model.config.kv_heads
        return plan_decode(tables, lengths, self._facts.block_size, kv_heads, self._dtype, self._device, window)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)


def _output_positions(chunk: Chunk) -> tuple[int, int]:
    """The part of a chunk that is output: from where to where. Empty for a chunk of a prompt."""
    end = chunk.start + chunk.count
    return min(max(chunk.start, chunk.sequence.prompt_length), end), end
