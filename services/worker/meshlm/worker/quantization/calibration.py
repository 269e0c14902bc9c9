"""The text that a model is calibrated on, as tokens, and what it shows of the inputs of each matrix."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.quantization.scoring import ScoredModel
from meshlm.worker.text.tokenizer import Tokenizer

MINIMUM_TOKENS = 64  # fewer tell nothing


def packaged_text() -> str:
    """A few kilobytes of our own: prose, dialogue, code, numbers. For when no corpus is at hand."""
    return (files(__package__) / "calibration.txt").read_text("utf-8")


def texts_of(text: str, tokenizer: Tokenizer, length: int, limit: int) -> list[torch.Tensor]:
    """`text` as int64 tokens, cut into texts of `length` (the last may be shorter), `limit` tokens in all.

    Each begins with the beginning token where the model's file asks for one. Raises ValueError: too short.
    """
    tokens = tokenizer.encode(text)[:limit]
    if len(tokens) < MINIMUM_TOKENS:
        raise ValueError(f"a text of {len(tokens)} tokens is too short to measure with; {MINIMUM_TOKENS} are the least")
    begin = [tokenizer.bos_id] if tokenizer.facts.adds_bos and tokenizer.bos_id is not None else []
    inner = length - len(begin)
    pieces = [begin + tokens[start : start + inner] for start in range(0, len(tokens), inner)]
    return [torch.tensor(piece, dtype=torch.int64) for piece in pieces if len(piece) > 1 + len(begin)]


def importance(model: ScoredModel, texts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The mean square of each input column of each matrix that multiplies: (cols,) each, by canonical name."""
    tokens = sum(len(text) for text in texts)
    with model.observed() as squares:
        for text in texts:
            hidden = model.hidden(text)
            torch.nn.functional.linear(hidden, model.head)
    return {name: total / tokens for name, total in squares.items()}


def read_text(path: Path) -> str:
    """Raises ModelFileError: no such file, or not UTF-8."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(path, f"cannot be read as text: {error}") from None
