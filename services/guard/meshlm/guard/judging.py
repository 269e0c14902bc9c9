"""What a model that judges is asked, and what it answers: the seam between policies and the models behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

# An attack on the model that reads the text; or content that is harmful in itself (Llama Guard's S1 to S14).
Head = Literal["attack", "harm"]


@dataclass(frozen=True)
class Turn:
    """One turn of the conversation that is judged."""

    # `system`, `user`, `assistant` or `tool`.
    role: str
    # Its text, as it was given.
    text: str
    # Where it begins in all turns' texts joined by a line feed, characters.
    offset: int = 0
    # Its text is not the speaker's own: a document, a web page, what a tool returned.
    untrusted: bool = False
    # Whether it is to be judged itself; if not, it is there to be read along.
    judged: bool = True


@dataclass(frozen=True)
class Opinion:
    """What a model thinks of a text."""

    # Who says so, with its version, e.g. `embedded-1-0a1b2c3d/harm`, `llama-guard-3/9f8e7d6c`.
    detector: str
    head: Head
    # Calibrated probability. Range [0, 1].
    score: float
    # What it is about, the likeliest first: `injection.model`, or S1 to S14. May be empty while the score is low.
    categories: tuple[str, ...] = ()
    # Characters of the joined turns (of the answer, for an answer): start inclusive, end exclusive.
    start: int = 0
    end: int = 0


class JudgeError(Exception):
    """A model cannot judge now: it is down, late, or answers nonsense. Never holds any of the text."""


class Judge(Protocol):
    """A model that judges. Reentrant: several texts are judged at a time."""

    @property
    def version(self) -> str:
        """Names the model and all that its scores depend on; a part of the policy's version."""

    async def judge_prompt(
        self, turns: Sequence[Turn], heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """At most one opinion for each head that this model has: its highest score over the turns to be judged.

        Raises JudgeError.
        """

    async def judge_answer(
        self, turns: Sequence[Turn], answer: str, heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        """The same for an answer so far, in its conversation. Called again as the answer grows, with the same
        `request_id`: what was computed for its beginning may be kept. Raises JudgeError.
        """
