"""Runs a torch model over the chunks of a step: flat batch in, tokens out."""

from __future__ import annotations

import torch

from meshlm.kernels.kv_cache import allocate_kv_cache
from meshlm.kernels.paged_attention import DecodeGroup, plan_decode
from meshlm.kernels.prefill_attention import padded_blocks
from meshlm.worker.engine.sampler import Sampler
from meshlm.worker.engine.sequence import Chunk, Sampled, Sequence, StepOutOfMemory
from meshlm.worker.messages import ModelFacts
from meshlm.worker.models.batch import Batch, PrefillSpan
from meshlm.worker.models.layers import Model


class TorchRunner:
    """The `Runner` of the engine on a CPU or a CUDA device. Not thread-safe: one engine calls it."""

    def __init__(
        self,
        model: Model,
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

    def run(self, chunks: list[Chunk]) -> list[Sampled | None]:
        """See `Runner.run`. A step that fails leaves nothing the scheduler could see: what it wrote are slots beyond
        each sequence's `computed`, which the next try overwrites."""
        order = sorted(range(len(chunks)), key=lambda index: _place(chunks[index]))
        sampled = [index for index in order if chunks[index].sample]
        try:
            logits = self.logits([chunks[index] for index in order])
            tokens = self._sampler.sample(logits, [chunks[index].sequence for index in sampled]) if sampled else []
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise StepOutOfMemory(str(error)) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error) or "not enough memory" in str(error):  # torch's CPU allocator
                raise StepOutOfMemory(str(error)) from error
            raise
        results: list[Sampled | None] = [None] * len(chunks)
        for index, token in zip(sampled, tokens, strict=True):
            results[index] = token
        return results

    @torch.inference_mode()
    def logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """Store keys and values of the chunks; logits of those that sample, in order: (samples, vocab) float32.

        chunks: in the order of `_place`.
        """
        return self._model.forward(self._batch(chunks), self._cache)

    def forget(self, sequence: Sequence) -> None:
        self._sampler.forget(sequence)

    def _batch(self, chunks: list[Chunk]) -> Batch:
        size = self._facts.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        spans: list[PrefillSpan] = []
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            if not _decodes(chunk):
                blocks = self._tensor(padded_blocks(sequence.blocks, end, size))
                spans.append(PrefillSpan(len(tokens), chunk.count, chunk.start, blocks))
            tokens += sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            slots += [sequence.blocks[p // size] * size + p % size for p in range(chunk.start, end)]
            if chunk.sample:
                rows.append(len(tokens) - 1)
        return Batch(
            tokens=self._tensor(tokens),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            rows=self._tensor(rows),
            decode=self._decode_groups(chunks[: len(chunks) - len(spans)]),
            prefill=tuple(spans),
        )

    def _decode_groups(self, chunks: list[Chunk]) -> tuple[DecodeGroup, ...]:
        tables = [chunk.sequence.blocks for chunk in chunks]
        lengths = [chunk.start + 1 for chunk in chunks]
        kv_heads = self._model.config.kv_heads
        return plan_decode(tables, lengths, self._facts.block_size, kv_heads, self._dtype, self._device)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._device)


def _decodes(chunk: Chunk) -> bool:
    """A single output token goes the decode way. A single prompt token does not: which kernel computes a position must
    not depend on how the scheduler cut the prompt."""
    return chunk.count == 1 and chunk.start >= chunk.sequence.prompt_length


def _place(chunk: Chunk) -> tuple[bool, int]:
    """The order within a batch: decoding sequences first, the shortest context first."""
    return (False, chunk.start) if _decodes(chunk) else (True, 0)
