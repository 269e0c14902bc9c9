"""Constrained decoding of categories by scores alone: at each place where the grammar leaves a choice, the likeliest
token that it allows.

The grammar is `unsafe\\n`, codes with commas between, none twice, and the end of the turn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

MOST_TOKENS = 20

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Grammar:
    """The verdict's words as the model's tokens."""

    # What `safe` and `unsafe` begin with alike: mostly nothing.
    lead: Tokens
    # The first tokens that differ: they tell the verdict.
    safe: int
    unsafe: int
    # By code: `unsafe`, a line feed and the code; and a comma and the code, as they follow another code.
    first: Mapping[str, Tokens]
    more: Mapping[str, Tokens]
    # Ends the turn.
    end: int


# For each token that may come next, the logarithm of its probability behind the prompt and `tokens`.
Scorer = Callable[[Sequence[int], Sequence[int]], Awaitable[Sequence[float]]]


async def decode(grammar: Grammar, score: Scorer) -> Tokens:
    """The tokens of an unsafe verdict, the end not among them; cut before a code that would pass MOST_TOKENS."""
    path = _Path(grammar)
    while len(path.tokens) < MOST_TOKENS:
        options = path.options()
        chosen = options[0]
        if len(options) > 1:
            scores = await score(path.tokens, options)
            chosen = max(zip(options, scores, strict=True), key=lambda pair: pair[1])[0]
        if chosen == grammar.end and path.complete is not None:
            return tuple(path.tokens)
        path.take(chosen)
    return path.settled


class _Path:
    """How far a verdict has come."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.tokens: list[int] = []
        self._alive = dict(grammar.first)  # codes that the current unit may still become, with the unit's tokens
        self._begin = 0  # of the current unit
        self._used: tuple[str, ...] = ()
        self._whole: Tokens = ()  # up to where it began

    @property
    def complete(self) -> str | None:
        """The code that the current unit is, if it is one already."""
        length = len(self.tokens) - self._begin
        return next((code for code, unit in self._alive.items() if len(unit) == length), None)

    @property
    def settled(self) -> Tokens:
        """All tokens up to the end of the last code that cannot become another one."""
        length = len(self.tokens) - self._begin
        growing = self.complete is None or any(len(unit) > length for unit in self._alive.values())
        return self._whole if growing else tuple(self.tokens)

    def options(self) -> list[int]:
        """Tokens that may come next, each once: the end first, for it wins a tie."""
        length = len(self.tokens) - self._begin
        longer = [unit[length] for unit in self._alive.values() if len(unit) > length]
        code = self.complete
        if code is None:
            return list(dict.fromkeys(longer))
        return list(dict.fromkeys([self._grammar.end, *longer, *(unit[0] for unit in self._others(code).values())]))

    def take(self, token: int) -> None:
        """Go on with one of the options."""
        length, code = len(self.tokens) - self._begin, self.complete
        alive = {c: unit for c, unit in self._alive.items() if len(unit) > length and unit[length] == token}
        if not alive and code is not None:  # another code begins
            self._whole, self._used = tuple(self.tokens), (*self._used, code)
            self._begin = len(self.tokens)
            alive = {c: unit for c, unit in self._unused().items() if unit[0] == token}
        self.tokens.append(token)
        self._alive = alive

    def _others(self, code: str) -> dict[str, Tokens]:
        return {c: unit for c, unit in self._unused().items() if c != code}

    def _unused(self) -> dict[str, Tokens]:
        return {code: unit for code, unit in self._grammar.more.items() if code not in self._used}
