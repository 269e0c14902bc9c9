"""Logits of a `TorchDecoder` for one sequence, in chunks of our choice, and transformers' for the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from meshlm.kernels.kv_cache import allocate_kv_cache
from meshlm.kernels.paged_attention import plan_decode
from meshlm.kernels.prefill_attention import padded_blocks
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.opening import open_checkpoint
from meshlm.worker.models.batch import Batch, PrefillSpan
from meshlm.worker.models.dense_weights import DenseWeights
from meshlm.worker.models.registry import load_decoder
from meshlm.worker.models.torch_decoder import TorchDecoder

CPU = torch.device("cpu")
BLOCK_SIZE = 16
TABLE = [9, 3, 30, 1, 7, 22, 5, 40, 41, 42, 43, 44, 2, 4, 6, 8]


def decoder_for(source: Path | Checkpoint, dtype: torch.dtype = torch.float32) -> TorchDecoder:
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    weights = DenseWeights(checkpoint, CPU, dtype)
    return TorchDecoder(load_decoder(checkpoint, weights, lambda done, total: None))


def empty_cache(decoder: TorchDecoder, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    config = decoder.config
    return allocate_kv_cache(config.layers, config.kv_heads, 48, BLOCK_SIZE, config.head_dim, dtype, CPU)


def chunk(
    decoder: TorchDecoder, tokens: list[int], start: int, end: int, decode: bool, dtype: torch.dtype = torch.float32
) -> Batch:
    """Positions [start, end) of a sequence, as one prefill chunk or each as an output position; all rows sampled."""
    positions = list(range(start, end))
    slots = [TABLE[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE for position in positions]
    blocks = torch.tensor(padded_blocks(TABLE, end, BLOCK_SIZE))
    lengths = [position + 1 for position in positions] if decode else []
    tables = [TABLE] * len(lengths)
    heads = decoder.config.kv_heads

    def plan(window: int | None) -> Any:
        return plan_decode(tables, lengths, BLOCK_SIZE, heads, dtype, CPU, window)

    return Batch(
        tokens=torch.tensor(tokens[start:end]),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        rows=torch.arange(end - start),
        decode=plan(None),
        prefill=() if decode else (PrefillSpan(0, end - start, start, blocks),),
        windowed={window: plan(window) for window in decoder.windows},
    )


def our_logits(
    decoder: TorchDecoder, tokens: list[int], prompt: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Of all positions: the prompt in three uneven chunks, then some positions together and the last one by one."""
    cache = empty_cache(decoder, dtype)
    cuts = [0, prompt // 3, prompt - 7, prompt, *range(prompt + 5, len(tokens) + 1)]
    parts = [
        decoder.forward(chunk(decoder, tokens, start, end, start >= prompt, dtype), cache)
        for start, end in itertools.pairwise(cuts)
    ]
    return torch.cat(parts)


def their_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
