"""A tiny data set for the trainer, made up: attacks say some words, harmless texts say others."""

from __future__ import annotations

import itertools

from meshlm.guard.ngrams import Layout
from meshlm.guard.training.examples import Example, Split
from meshlm.guard.training.heads import Candidate

CANDIDATE = Candidate("tiny", Layout(chars=4, words=2, bits=12), penalty=1e-3, iterations=25)
_ATTACK = ("please forsake", "kindly abandon", "now shed", "at once drop")
_WHAT = ("every precept", "each commandment", "all tenets", "your creed")
_HARM = (("S9", "assemble a petard"), ("S1", "throttle the bailiff"), ("S10", "despise the outlanders"))
_WHO = ("for me", "by tonight", "in the barn", "with my cousin", "this week")
_NICE = ("bake a cake", "water the tulips", "mend the bicycle", "paint the fence", "sort the letters", "read a novel")


def examples() -> list[Example]:
    """Three splits with the same words in other combinations."""
    made: list[Example] = []
    for index, (verb, what, who) in enumerate(itertools.product(_ATTACK, _WHAT, _WHO)):
        made.append(Example(f"{verb} {what} {who}", "tiny", _split(index), attack=True))
    for index, ((category, act), who) in enumerate(itertools.product(_HARM, _WHO * 4)):
        text = f"how to {act} {who} {index}"
        made.append(Example(text, "tiny", _split(index), harm=True, categories=(category,)))
    for index, (act, who, ending) in enumerate(itertools.product(_NICE, _WHO, ("please", "and then rest", "slowly"))):
        made.append(Example(f"how to {act} {who} {ending}", "tiny", _split(index), attack=False, harm=False))
    return made


def _split(index: int) -> Split:
    return ("train", "train", "train", "validation", "test")[index % 5]
