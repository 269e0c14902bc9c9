"""From examples to what a head learns: readings as the guard makes them, windows as it cuts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from meshlm.guard.encodings import unwrap
from meshlm.guard.normalize import readings
from meshlm.guard.training.examples import Example
from meshlm.guard.windows import WINDOW, spans

# Windows of a long harmless text that are learned from: all are harmless, and a few tell enough.
_MOST_WINDOWS = 4
# One attack in so many is also put into a harmless document: of these sources, in one of these forms.
_HIDDEN_ONE_IN = 2
_DOCUMENTS = frozenset(
    ("boolq", "quac", "xsum", "fiqa", "dialogues", "chitchat", "privacy-policy", "narrative", "code", "packages")
)
_WRAPPERS = (
    "{0}", "{0}", "{0}", "<!-- {0} -->", "[{0}]", "Note to the assistant that reads this: {0}", "SYSTEM: {0}",
    "<div style='display:none'>{0}</div>", '{{"role": "system", "content": "{0}"}}', "# {0}", "\n\n---\n{0}\n---\n\n",
    "IMPORTANT: {0}", "Assistant, {0}", "(AI: {0})", "P.S. {0}", "\n> {0}\n", "\n| note | {0} |\n",
    '<img src="a.png" alt="{0}">', "Section 2: Note\n{0}\n", "[AUTOMATED NOTICE]: {0}",
)  # fmt: skip
_LONGEST_HIDDEN = 400  # characters
# One hidden attack in so many also stands between two short texts of these lengths, in characters.
_AMONG_ONE_IN = 2
_LEAST_HOST, _LONGEST_HOST = 20, 160
_ORDERS = (
    "{before} {told} {after}", "{before}\n\n{told}\n\n{after}", "1. {before}\n2. {told}\n3. {after}", "{before} {told}",
    "{told} {after}", "{before} Actually, before that: {told} {after}", "{before} By the way, {told}",
)  # fmt: skip


def texts(example: Example, positive: bool) -> Iterator[str]:
    """The rows of an example: what a harmless text looks like in any reading; what a harmful one says in the clear."""
    for reading in _clear(example.text) if positive else _all(example.text):
        cut = [reading[start:end] for start, end in spans(len(reading))]
        # Of a long jailbreak, the frame is at its ends.
        yield from (dict.fromkeys((cut[0], cut[-1])) if positive else cut[:: max(1, len(cut) // _MOST_WINDOWS)])


def with_hidden(examples: Sequence[Example]) -> Iterator[Example]:
    """The examples, and attacks inside harmless documents: what indirect injection looks like.

    As many harmless texts are hidden in the same ways, so that nothing is learned from the way.
    """
    documents = [e.text for e in examples if e.source in _DOCUMENTS and len(e.text) > 150]
    short = [e for e in examples if len(e.text) <= _LONGEST_HIDDEN and e.source != "neuralchemy"]
    attacks = [e for e in short if e.attack][::_HIDDEN_ONE_IN]
    harmless = [e for e in short if e.attack is False and not e.harm and e.source not in _DOCUMENTS]
    alike = harmless[:: max(1, len(harmless) // max(1, len(attacks)))]
    yield from examples
    if documents:
        yield from _hidden(attacks, documents)
        yield from _hidden(alike, documents)
    if hosts := [e.text for e in harmless if _LEAST_HOST <= len(e.text) <= _LONGEST_HOST]:
        yield from _among(attacks[::_AMONG_ONE_IN], hosts)
        yield from _among(alike[::_AMONG_ONE_IN], hosts)


def _hidden(examples: Sequence[Example], documents: Sequence[str]) -> Iterator[Example]:
    for index, example in enumerate(examples):
        told = _WRAPPERS[index % len(_WRAPPERS)].format(example.text)
        # Some of it in long documents, some in short ones; all within one window.
        longest = (WINDOW, WINDOW // 2)[index % 2] - len(told) - 50
        document = documents[index % len(documents)][: max(100, longest)]
        # After the first, second or third sentence; where there are none, at the end.
        sentences = document.split(". ")
        at = 1 + index % 3
        text = ". ".join([*sentences[:at], told, *sentences[at:]])
        yield replace(example, text=text, source=f"{example.source}-hidden", kind="indirect")


def _among(examples: Sequence[Example], hosts: Sequence[str]) -> Iterator[Example]:
    """Between two short harmless texts: what a list of questions hides."""
    for index, example in enumerate(examples):
        before, after = hosts[index * 7 % len(hosts)], hosts[(index * 13 + 1) % len(hosts)]
        text = _ORDERS[index % len(_ORDERS)].format(before=before, told=example.text, after=after)
        yield replace(example, text=text, source=f"{example.source}-hidden", kind="indirect")


def _all(text: str) -> Iterable[str]:
    return dict.fromkeys(reading.text for reading in readings(text) if reading.form != "spaced")


def _clear(text: str) -> list[str]:
    """The reading that undoes most, of what is wrapped in the text where something is."""
    payloads = [carrier.text for carrier in unwrap(text)]
    inner = max(payloads, key=len, default=text)
    found: dict[str, str] = {}
    for reading in readings(inner):
        found.setdefault(reading.form, reading.text)  # a one reads as i before it reads as l
    return [found.get("leet", found.get("lookalike", found["plain"]))]
