"""Optimised suffixes, made up: pieces of words, marks and code in no order, behind a goal; and harmless texts of such.

A search over a model's tokens gives other pieces for each goal and model, so that a list of them says little of the
next; that there is no order to them says more. The pieces are cut from texts that are learned from anyway.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from meshlm.guard.training.examples import Example, split_of

_PIECE = re.compile(r" ?[^\W\d_]{2,9}|\d{1,3}| ?[^\w\s]{1,4}|_")
_ROWS = 1500
_PIECES = (12, 30)  # of one suffix
_MARKS_ONE_IN = 3  # pieces from code
_LISTS = 600
_SEPARATORS = ("\n", ", ", " ", '", "', " | ", "; ", "\t", "\n- ")
_LONGEST_GOAL = 160  # characters


def suffixed(goals: Sequence[str], prose: Sequence[str], code: Sequence[str]) -> Iterator[Example]:
    """Goals with suffixes behind them, and some before them. The split is the suffix's."""
    words, marks = _pieces(prose), _pieces(code)
    short = [goal for goal in goals if len(goal) <= _LONGEST_GOAL]
    if not (words and marks and short):
        return
    for index in range(_ROWS):
        draw = _draws(index)
        length = _PIECES[0] + next(draw) % (_PIECES[1] - _PIECES[0])
        pieces = []
        for _ in range(length):
            of = marks if next(draw) % _MARKS_ONE_IN == 0 else words
            pieces.append(of[next(draw) % len(of)])
        suffix = "".join(pieces).strip()
        goal = short[next(draw) % len(short)]
        text = f"{suffix} {goal}" if index % 10 == 9 else f"{goal} {suffix}"
        yield Example(text, "noise", split_of(suffix), attack=True, kind="suffix")


def listed(prose: Sequence[str], code: Sequence[str]) -> Iterator[Example]:
    """Words and marks in no order that harm nobody: vocabularies, columns, tables, names of a program."""
    words, marks = [piece.strip() for piece in _pieces(prose)], [piece.strip() for piece in _pieces(code)]
    if not (words and marks):
        return
    for index in range(_LISTS):
        draw = _draws(_ROWS + index)
        of = marks if index % 4 == 3 else words
        drawn = [of[next(draw) % len(of)] for _ in range(_PIECES[0] + next(draw) % 40)]
        drawn = [piece for piece in drawn if piece] or ["none"]
        separator = _SEPARATORS[index % len(_SEPARATORS)]
        text = separator.join(sorted(drawn) if index % 2 else drawn)
        yield Example(text, "lists", split_of(text), attack=False, kind="look-alike")


def _pieces(texts: Sequence[str]) -> list[str]:
    """Distinct pieces: rare ones are as likely as common ones, as they are for a search."""
    return sorted({piece for text in texts for piece in _PIECE.findall(text)})


def _draws(seed: int) -> Iterator[int]:
    """Numbers that only depend on the seed."""
    count = 0
    while True:
        block = hashlib.sha256(f"{seed}:{count}".encode()).digest()
        yield from (int.from_bytes(block[at : at + 4], "little") for at in range(0, 32, 4))
        count += 1
