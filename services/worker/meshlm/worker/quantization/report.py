"""What formats cost in quality and save in memory, as a table: each beside the exact model, on the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from meshlm.worker.quantization.plan import BITS, Format
from meshlm.worker.quantization.scoring import Quality, Reference, ScoredModel, compare, matched
from meshlm.worker.quantization.sensitivity import exchange

GENERATED = 64  # tokens of a free answer
PROMPT = 32  # tokens before it


@dataclass(frozen=True, slots=True)
class Row:
    """Memory is of all weight matrices; `saved` is its share of what they take in fp16."""

    name: str
    bits: float  # a weight
    megabytes: float
    saved: float
    perplexity: float
    rise: float  # over the exact model's: 0.01 is 1%
    kl: float | None = None  # nats a token
    agreement: float | None = None  # share of greedy tokens that are the same, the text before them given
    matched: float | None = None  # greedy tokens of a free answer until the first other one, the mean, of GENERATED


@dataclass(frozen=True, slots=True)
class Answers:
    """What the exact model writes, greedily, behind the beginnings of some texts."""

    texts: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, model: ScoredModel, texts: Sequence[torch.Tensor], count: int) -> Answers:
        begins = [text[:PROMPT] for text in texts if len(text) >= PROMPT]
        return cls(tuple(model.generate(begin, GENERATED) for begin in begins[:count]))

    def matched(self, model: ScoredModel) -> float | None:
        counts = [matched(model, text, PROMPT) for text in self.texts]
        return sum(counts) / len(counts) if counts else None


def format_rows(
    model: ScoredModel,
    exact: Reference,
    answers: Answers,
    candidates: Mapping[str, Mapping[str, Format]],
    importance: Mapping[str, torch.Tensor],
    told: Callable[[str], None],
) -> Iterator[Row]:
    """Weights alone: each candidate (formats by matrix) in float32 arithmetic. The model is restored behind each."""
    for name, formats in candidates.items():
        told(name)
        exchange(model, formats, importance)
        quality, match = compare(model, exact), answers.matched(model)
        model.restore(list(formats))
        sizes = {matrix: weight.numel() for matrix, weight in model.matrices.items()}
        yield row_of(name, quality, size_bits(sizes, formats), sum(sizes.values()), match)


def size_bits(sizes: Mapping[str, int], formats: Mapping[str, Format]) -> float:
    """Bits a weight, on the average over matrices of these sizes."""
    return sum(size * BITS[formats.get(name, Format.DENSE)] for name, size in sizes.items()) / sum(sizes.values())


def row_of(name: str, quality: Quality, bits: float, weights: int, match: float | None) -> Row:
    return Row(
        name=name,
        bits=bits,
        megabytes=weights * bits / 8e6,
        saved=1 - bits / 16,
        perplexity=quality.perplexity,
        rise=quality.rise,
        kl=quality.kl,
        agreement=quality.agreement,
        matched=match,
    )


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("weights", lambda row: row.name),
    ("bits", lambda row: f"{row.bits:.2f}"),
    ("MB", lambda row: f"{row.megabytes:.0f}"),
    ("of fp16", lambda row: f"{-row.saved:+.0%}"),
    ("perplexity", lambda row: f"{row.perplexity:.3f}"),
    ("rise", lambda row: f"{row.rise:+.2%}"),
    ("KL a token", lambda row: "" if row.kl is None else f"{row.kl:.5f}"),
    ("same token", lambda row: "" if row.agreement is None else f"{row.agreement:.2%}"),
    (f"same of {GENERATED}", lambda row: "" if row.matched is None else f"{row.matched:.1f}"),
)


def as_table(rows: Sequence[Row]) -> str:
    """In Markdown, columns aligned so that a terminal shows it well."""
    cells = [[title for title, _ in _COLUMNS], *([show(row) for _, show in _COLUMNS] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def as_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
