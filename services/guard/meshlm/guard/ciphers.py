"""English in a cipher that keeps words apart, known by its common words: Caesar's shifts, Atbash, rot47, backwards.

Names and other languages have one of the enciphered words by chance, and rarely two: a line is meant where it has so
many letters of them. A line is read once for all ciphers, in linear time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

_MEANT = 10  # letters of distinct common words
_COMMON = (
    *("this", "that", "with", "your", "from", "have", "will", "what", "when", "which", "would", "should", "about"),
    *("ignore", "disregard", "forget", "previous", "above", "system", "prompt", "instructions", "rules", "reveal"),
    *("pretend", "unrestricted", "password", "secret", "without", "restrictions", "guidelines", "respond", "write"),
    *("following", "message", "answer", "question", "explain", "make", "every", "under", "never", "must", "them"),
    *("please", "tell", "show", "they"),
)
_LINE = re.compile(r"[^\n]{8,}+")
_LATIN = "abcdefghijklmnopqrstuvwxyz"
# Letters in lower case, and blanks for all else.
_LOWER = bytes(byte | 32 if chr(byte).isalpha() and byte < 128 else 32 for byte in range(256))
_RUN = re.compile(r"[^\W\d_]+")
_CASED = str.maketrans("ſİı", "sii")  # letters that are another's in some case


def deciphered(text: str) -> Iterator[tuple[str, str, int, int]]:
    """Of each line that is meant in a cipher: which, what it says, and its range."""
    if not _meant(text):  # nor is any of its lines
        return
    for match in _LINE.finditer(text):
        line = match.group()
        for form in _meant(line):
            yield form, _CIPHERS[form](line), match.start(), match.end()


def _meant(line: str) -> list[str]:
    letters: Counter[str] = Counter()
    for word in words(line) & _WORDS.keys():
        for form in _WORDS[word]:
            letters[form] += len(word)
    for word in {*line.split(), *line.replace('"', " ").split()} & _MARKED.keys():
        letters["rot47"] += len(_MARKED[word])
    return [form for form in _CIPHERS if letters[form] >= _MEANT]


def words(line: str) -> set[str]:
    """The distinct runs of letters, in lower case."""
    if line.isascii():
        return set(line.encode().translate(_LOWER).decode().split())
    return {run.translate(_CASED).lower() for run in _RUN.findall(line)}


def said(text: str) -> bool:
    """Whether a text has common words of English, as much as makes a line meant."""
    return sum(map(len, words(text) & _KNOWN)) >= _MEANT


def _letters(table: str) -> Callable[[str], str]:
    """A cipher that reads each letter as that of a table, in either case."""
    read = str.maketrans(_LATIN + _LATIN.upper(), table + table.upper())
    return lambda text: text.translate(read)


def _backwards(text: str) -> str:
    return text[::-1]


def _rot47(text: str) -> str:
    return text.translate(_ROT47)


_ROT47 = {code: 33 + (code - 33 + 47) % 94 for code in range(33, 127)}
_CIPHERS: dict[str, Callable[[str], str]] = {
    "rot13": _letters(_LATIN[13:] + _LATIN[:13]),
    "reversed": _backwards,
    **{f"caesar {by}": _letters(_LATIN[-by:] + _LATIN[:-by]) for by in range(1, 26) if by != 13},
    "atbash": _letters(_LATIN[::-1]),
    "rot47": _rot47,
}
_KNOWN = frozenset(_COMMON)


def _enciphered() -> dict[str, list[str]]:
    """Each common word in each cipher of letters, and which ciphers these are."""
    found: dict[str, list[str]] = {}
    # The shift that undoes a shift is another one, so each word is enciphered by what undoes its reading.
    inverse = {form: f"caesar {26 - int(form.split()[1])}" for form in _CIPHERS if form.startswith("caesar")}
    for form in _CIPHERS:
        if form != "rot47":
            for word in _COMMON:
                found.setdefault(_CIPHERS[inverse.get(form, form)](word), []).append(form)
    return found


_WORDS = _enciphered()
# In rot47 a letter's capital is another character, and a mark is part of a word.
_MARKED = {_rot47(spelled): word for word in _COMMON for spelled in (word, word.capitalize(), word.upper())}
