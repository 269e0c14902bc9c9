"""What a model is asked about a conversation: the last turn in its context, others in bulk, long ones in parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from meshlm.guard.judging import Turn
from meshlm.guard.llama.config import LlamaGuardConfig
from meshlm.guard.llama.prompts import Role

# Share of a part that the next one begins before its end, so that nothing is only ever seen in halves.
_OVERLAP = 10
_LEAST_CHARS = 64


@dataclass(frozen=True)
class Task:
    """One question: whether the text is harmful, spoken by `role` after `context`."""

    context: tuple[tuple[Role, str], ...]
    role: Role
    text: str
    # Where the text lies in what was to be judged, characters; of several turns, from the first's start to the last's
    # end.
    start: int
    end: int

    @property
    def turns(self) -> list[tuple[Role, str]]:
        return [*self.context, (self.role, self.text)]

    def smaller(self) -> list[Task]:
        """The same in fewer tokens at a time: less context, or the text in two parts; nothing where it is too short."""
        if self.context:
            return [replace(self, context=self.context[(len(self.context) + 1) // 2 :])]
        length = len(self.text)
        if length < _LEAST_CHARS:
            return []
        middle, lap = length // 2, length // (2 * _OVERLAP)
        exact = self.end - self.start == length
        return [
            replace(
                self,
                text=self.text[begin:end],
                start=self.start + begin if exact else self.start,
                end=self.start + end if exact else self.end,
            )
            for begin, end in ((0, middle + lap), (middle - lap, length))
        ]


def of_prompt(turns: Sequence[Turn], config: LlamaGuardConfig) -> list[Task]:
    """The last turn that is to be judged, after what was said before it; and the earlier ones."""
    judged = [index for index, turn in enumerate(turns) if turn.judged and turn.text.strip()]
    if not judged:
        return []
    last = turns[judged[-1]]
    context = _context(turns[: judged[-1]], config.context_chars)
    earlier = _in_bulk([turns[index] for index in judged[:-1]], config.segment_chars)
    return [*_cut(context, _role(last), last.text, last.offset, config.segment_chars), *earlier]


def of_answer(turns: Sequence[Turn], answer: str, config: LlamaGuardConfig) -> list[Task]:
    """The answer so far, after the conversation. As it grows, all parts but the last stay as they are."""
    if not answer.strip():
        return []
    return list(_cut(_context(turns, config.context_chars), "Agent", answer, 0, config.segment_chars))


def _role(turn: Turn) -> Role:
    """Words of others come in from outside, whoever passes them on."""
    return "Agent" if turn.role == "assistant" and not turn.untrusted else "User"


def _context(turns: Sequence[Turn], chars: int) -> tuple[tuple[Role, str], ...]:
    """The latest turns, of the earliest of them its end. The model knows no system's turns."""
    taken: list[tuple[Role, str]] = []
    for turn in reversed(turns):
        if turn.role in ("system", "developer") and not turn.judged:
            continue
        if chars <= 0:
            break
        text = turn.text[-chars:]
        chars -= len(text)
        if text.strip():
            taken.append((_role(turn), text))
    return tuple(reversed(taken))


def _cut(context: tuple[tuple[Role, str], ...], role: Role, text: str, offset: int, size: int) -> Iterator[Task]:
    begin = 0
    while True:
        end = min(begin + size, len(text))
        if text[begin:end].strip():
            yield Task(context, role, text[begin:end], offset + begin, offset + end)
        if end == len(text):
            return
        begin = end - size // _OVERLAP


def _in_bulk(turns: Sequence[Turn], size: int) -> Iterator[Task]:
    """As many turns of one speaker at a time as fit, so that ten thousand short ones are not ten thousand questions."""
    waiting: list[Turn] = []
    for turn in turns:
        length = sum(len(other.text) + 2 for other in waiting)
        if waiting and (_role(turn) != _role(waiting[0]) or length + len(turn.text) > size):
            yield _bulk(waiting)
            waiting = []
        if len(turn.text) > size:
            yield from _cut((), _role(turn), turn.text, turn.offset, size)
        else:
            waiting.append(turn)
    if waiting:
        yield _bulk(waiting)


def _bulk(turns: Sequence[Turn]) -> Task:
    first, last = turns[0], turns[-1]
    text = "\n\n".join(turn.text for turn in turns)
    return Task((), _role(first), text, first.offset, last.offset + len(last.text))
