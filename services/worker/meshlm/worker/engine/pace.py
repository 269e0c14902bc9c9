"""The promise to running streams: a step with prompt tokens in it takes at most `stall_ratio` times one without.

So a prompt gets what the promise leaves, (stall_ratio - 1) / stall_ratio of the machine, however slow that is. How many
tokens a step that makes follows from the steps so far: the seconds of a plain step (decodes alone), and the seconds
that a prompt token adds to one.

- Plain steps are measured by their number of decodes: SAMPLES of them before prompt tokens join, and again after FRESH
  steps. That costs a prompt 1 step in 30, and needs no model of the machine. The shortest of the latest counts, so that
  a slow step does not widen the promise. A plain step with up to a quarter more or fewer decodes does as well, taken as
  the least it can be: a step takes longer with more decodes, and longer a decode with fewer.
- The seconds a prompt token adds are the median of the latest steps, or those of the last one where that is more: they
  grow with the context, and too many tokens hurt where too few do not. Their number at most doubles from step to step,
  for where memory is the limit the first few tokens are nearly free and the next ones are not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

AIM = 0.8  # of the room that the promise leaves; the rest is for what measurements cannot foresee
FIRST_TOKENS = 8  # at most so many join where no step with prompt tokens is known
SAMPLES = 2
FRESH = 60  # steps
NEAR = 1.25  # ratio of numbers of decodes


@dataclass(slots=True)
class PlainSteps:
    """The latest steps with so many decodes and nothing else."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    last: int = 0  # the number of the latest


class Pace:
    """How many prompt tokens may join a step. Seconds are measured by the caller."""

    def __init__(self, stall_ratio: float, least: int) -> None:
        """least: tokens that may join in any case, so that a prompt gets on whatever was measured."""
        self._ratio = stall_ratio
        self._least = least
        self._step = 0
        self._plain: dict[int, PlainSteps] = {}  # by decodes
        self._mixed: deque[tuple[int, float]] = deque(maxlen=5)  # prompt tokens, and seconds that each added

    def allowance(self, decodes: int) -> int:
        """Prompt tokens that may join a step with at least one decode. 0 where a plain step is to be measured first."""
        plain = self._plain_seconds(decodes)
        if plain is None:
            return 0
        most = 2 * max((tokens for tokens, _ in self._mixed), default=FIRST_TOKENS // 2)
        token = max(median(seconds for _, seconds in self._mixed), self._mixed[-1][1]) if self._mixed else 0.0
        if token <= 0:
            return max(self._least, most)
        return max(self._least, min(most, int(AIM * (self._ratio - 1) * plain / token)))

    def observe(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """A step took so long."""
        self._step += 1
        if not decodes:
            return
        if prompt_tokens:
            plain = self._plain_seconds(decodes)
            if plain is not None:
                self._mixed.append((prompt_tokens, (seconds - plain) / prompt_tokens))
            return
        steps = self._plain.get(decodes)
        if steps is None:
            steps = self._plain[decodes] = PlainSteps()
        if self._step - steps.last > FRESH:
            steps.seconds.clear()
        steps.seconds.append(seconds)
        steps.last = self._step

    def _plain_seconds(self, decodes: int) -> float | None:
        """Of a step with so many decodes and nothing else, at least; None where nothing close was measured lately."""
        bounds = [
            min(steps.seconds) * min(1.0, decodes / measured)
            for measured, steps in self._plain.items()
            if max(decodes, measured) <= NEAR * min(decodes, measured)
            and len(steps.seconds) >= SAMPLES
            and self._step - steps.last <= FRESH
        ]
        return max(bounds, default=None)
