"""What a Llama Guard model may say: `safe`, or `unsafe` and a line of categories. Anything else is no verdict."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

CODE = re.compile(r"[OS][1-9]\d?")
_VERDICT = re.compile(r"\s*(?:safe|unsafe\n([OS]\d{1,2}(?:,[OS]\d{1,2})*))\s*")


class VerdictError(Exception):
    """What a model said is no verdict. Holds none of it."""


@dataclass(frozen=True)
class Verdict:
    """A verdict, read."""

    unsafe: bool
    # Each once, in the model's order; at least one where it is unsafe.
    categories: tuple[str, ...] = ()


def parse(text: str, known: Collection[str]) -> Verdict:
    """Read what a model said, space around it aside. `known`: the codes that it was told of. Raises VerdictError."""
    found = _VERDICT.fullmatch(text)
    if found is None:
        raise VerdictError("neither `safe` nor `unsafe` with categories")
    if found[1] is None:
        return Verdict(unsafe=False)
    categories = tuple(dict.fromkeys(found[1].split(",")))
    if not set(categories) <= set(known):
        raise VerdictError("a category that was not asked about")
    return Verdict(unsafe=True, categories=categories)
