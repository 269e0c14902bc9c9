"""Which scripts a text is written in: what a policy may say of languages and still know that it is so.

Detectors know some languages better than others, and a policy may want none that they do not know. Which language a
short text is in is a guess; which script its letters are of is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import regex

from meshlm.guard.findings import Finding

VERSION = "scripts/1"
CATEGORY = "language.script"
# A name or a quotation in another script is no other language: so many letters of it are, at least, and such a share.
_LETTERS = 8
_SHARE = 0.2


@cache
def _others(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    known = "".join(rf"\p{{Script={name}}}" for name in scripts)
    return regex.compile(rf"[\p{{L}}--[{known}\p{{Script=Common}}\p{{Script=Inherited}}]]", regex.V1)


def check(scripts: Sequence[str]) -> None:
    """Raises ValueError for a name that Unicode does not have."""
    for name in scripts:
        try:
            _others((name,))
        except regex.error:
            raise ValueError(f"{name}: no script of Unicode (as in Latin, Cyrillic, Han)") from None


def detect(text: str, scripts: Sequence[str]) -> list[Finding]:
    """One finding where much of a text is written in scripts other than these."""
    found = [match.start() for match in _others(tuple(scripts)).finditer(text)]
    if len(found) < _LETTERS:
        return []
    share = len(found) / sum(c.isalpha() for c in text)
    if share < _SHARE:
        return []
    return [Finding("script", CATEGORY, min(1.0, share), found[0], found[-1] + 1)]
