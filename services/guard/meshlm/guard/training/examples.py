"""What the heads learn from and are measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

# "held-out": of a source that is never learned from; weights are chosen by it.
Split = Literal["train", "validation", "test", "held-out"]
# The categories of Llama Guard 3, which are those of MLCommons.
CATEGORIES = tuple(f"S{number}" for number in range(1, 15))


@dataclass(frozen=True)
class Example:
    """A text, and what is known of it; None: nothing, and the head does not learn from it."""

    text: str
    # The data set: the unit by which quality is reported.
    source: str
    split: Split
    attack: bool | None = None
    harm: bool | None = None
    # Of a harmful text, where the data tells: S1 to S14.
    categories: tuple[str, ...] = ()
    # What kind of attack or of benign text, where the data tells.
    kind: str = ""


def split_of(text: str) -> Split:
    """The split of a text whose set has none: eight tenths, one, and one, by its own hash."""
    draw = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0]
    return "train" if draw < 205 else "validation" if draw < 230 else "test"
