"""Perplexity as the engine itself computes it: int8 activations and the KV cache's types included."""

from __future__ import annotations

import math
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Literal

import torch

from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.native_load import NATIVE_BLOCK
from meshlm.worker.engine.sequence import Chunk, ChunkScores, Runner, Sequence
from meshlm.worker.engine.settings import RunnerSettings
from meshlm.worker.messages import Limits, Sampling, Submit
from meshlm.worker.quantization.report import Row

_KvType = Literal["float32", "bfloat16", "int8", "int4"]
KV_TYPES: tuple[_KvType, ...] = ("float32", "bfloat16", "int8", "int4")


def engine_rows(
    path: Path, texts: Many[torch.Tensor], exact_loss: float, weights: int, threads: int | None
) -> list[Row]:
    """The file as a worker serves it, with each type of KV cache. exact_loss: the float32 reference's, nats a token.

    Raises ModelFileError and SettingsError.
    """
    longest = max(len(text) for text in texts)
    rows = []
    for kv_type in KV_TYPES:
        settings = RunnerSettings(
            path,
            engine="native",
            kv_dtype=kv_type,
            kv_blocks=-(-longest // NATIVE_BLOCK) + 2,
            block_size=NATIVE_BLOCK,
            threads=threads,
            step_tokens=longest,
        )
        runner = load_runner(settings, lambda stage, done, total: None)
        loss, facts = engine_loss(runner, texts), runner.facts
        bits = facts.weight_bytes * 8 / weights
        rows.append(
            Row(
                name=f"{facts.engine}, KV {kv_type}",
                bits=bits,
                megabytes=facts.weight_bytes / 1e6,
                saved=1 - bits / 16,
                perplexity=math.exp(loss),
                rise=math.exp(loss - exact_loss) - 1,
            )
        )
    return rows


def engine_loss(runner: Runner, texts: Many[torch.Tensor]) -> float:
    """Nats a token, the first token of each text left out."""
    total, count = 0.0, 0
    for number, text in enumerate(texts):
        tokens = text.tolist()
        request = Submit(
            id=f"text-{number}", prompt=tokens, sampling=Sampling(), limits=Limits(max_tokens=1), score_from=1
        )
        blocks = list(range(-(-len(tokens) // runner.facts.block_size)))
        sequence = Sequence(request, list(tokens), blocks=blocks)
        (scores,) = runner.run([Chunk(sequence, 0, len(tokens), False)])
        if not isinstance(scores, ChunkScores) or len(scores.logprobs) != len(tokens) - 1:
            raise RuntimeError(f"{len(tokens)} tokens were to be scored; the engine told {scores}")
        total -= sum(scores.logprobs)
        count += len(scores.logprobs)
        runner.forget(sequence)
    return total / count
