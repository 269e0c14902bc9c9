"""How much a large model is likely to gain over a small one on a prompt, from the prompt's look alone.

A linear scorer on a few features, learned by `benchmarks/model_routing.py` from questions that both models answered;
what it can and cannot tell is in docs/routing.md, with figures. Of a long prompt only the ends are looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

from meshlm.router.routing.confidence import Doubts
from meshlm.router.routing.config import ComplexityConfig
from meshlm.router.routing.quantiles import Recent, Similar, quantile
from meshlm.router.routing.tasks import ends_of, last_words
from meshlm.v1 import generation_pb2 as pb

# Characters at each end of the last message that are looked at.
_END_CHARS = 2000

_WORD = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NUMERAL = re.compile(
    r"\b(?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|hundred|thousand|dozen|"
    r"half|twice|double|triple|percent)\b"
)
_MATHS = re.compile(r"[=+*/^%<>±×÷√∑∫≤≥π]|\b(?:sum|equation|integral|matrix|probability|theorem|polynomial)\b")
_CODE = re.compile(r"```|[{};]|==|!=|->|=>|\b(?:def|class|return|import|function|const|void|select|printf?)\b")
_QUANTITY = re.compile(r"\bhow (?:many|much|far|long|old|often)\b|\b(?:total|altogether|remaining|left over|each)\b")
_REASON = re.compile(
    r"\b(?:why|explain|prove|derive|compare|contrast|analy[sz]e|evaluate|justify|infer|conclude|best describes|"
    r"most likely|according to|step by step)\b"
)
_LOOKUP = re.compile(r"\b(?:who|what|when|where|which)\b")
_NEGATION = re.compile(r"\b(?:not|no|never|except|without|neither|nor|least)\b|n't\b")
_OPTION = re.compile(r"^\(?[A-Ha-h][.)] ", re.MULTILINE)
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_SENTENCE = re.compile(r"[.!?](?:\s|$)")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")


def _log(count: float) -> float:
    return math.log2(1 + count)


class _Look:
    """A prompt, read once."""

    def __init__(self, source: pb.Input) -> None:
        last = last_words(source)
        self.turns = len(source.chat.messages)
        self.length = len(last)
        self.text = ends_of(last, _END_CHARS)
        self.low = self.text.lower()
        self.words = _WORD.findall(self.text)

    def count(self, pattern: re.Pattern[str]) -> float:
        return _log(len(pattern.findall(self.low)))

    def share(self, condition: Callable[[str], bool]) -> float:
        return sum(map(condition, self.words)) / len(self.words) if self.words else 0.0


# Each is small for most prompts: counts by their logarithm, shares in [0, 1].
_FEATURES: Mapping[str, Callable[[_Look], float]] = {
    "length": lambda look: _log(look.length),
    "turns": lambda look: _log(max(0, look.turns - 1)),
    "words_of_9_letters": lambda look: look.share(lambda word: len(word) >= 9),
    "names": lambda look: _log(len(_NAME.findall(look.text))),
    "other_scripts": lambda look: look.share(lambda word: not word.isascii()),
    "sentences": lambda look: look.count(_SENTENCE),
    "questions": lambda look: _log(look.text.count("?")),
    "lookup_words": lambda look: look.count(_LOOKUP),
    "reasoning_words": lambda look: look.count(_REASON),
    "quantity_words": lambda look: look.count(_QUANTITY),
    "negations": lambda look: look.count(_NEGATION),
    "numbers": lambda look: look.count(_NUMBER),
    "numerals": lambda look: look.count(_NUMERAL),
    "maths": lambda look: look.count(_MATHS),
    "code": lambda look: look.count(_CODE),
    "options": lambda look: _log(len(_OPTION.findall(look.text))),
    "items": lambda look: look.count(_ITEM),
}
FEATURES = tuple(_FEATURES)


def features(source: pb.Input) -> list[float]:
    """One number for each of FEATURES; of token ids, which have no words here, those of an empty text."""
    look = _Look(source)
    return [feature(look) for feature in _FEATURES.values()]


@dataclass(frozen=True)
class Scorer:
    """Weights over FEATURES, as they are, and what scores the questions had that they were learned from."""

    version: str
    weights: tuple[float, ...]
    bias: float
    quantiles: tuple[float, ...]  # of those scores, from the least to the greatest, evenly spaced

    def score(self, source: pb.Input) -> float:
        """In [0, 1]. 0.5: both models are expected to do as well; 1: the large one surely gains."""
        total = self.bias + sum(weight * value for weight, value in zip(self.weights, features(source), strict=True))
        return min(1.0, max(0.0, 0.5 + total / 2))

    def threshold(self, share: float) -> float:
        """The score that `share` of the questions it learned from do not pass."""
        return quantile(self.quantiles, share)


def load() -> Scorer:
    """The scorer that the router ships. Raises ValueError where it was learned on other features."""
    return parse(json.loads(resources.files("meshlm.router.routing").joinpath("complexity.json").read_text("utf-8")))


def parse(found: Mapping[str, Any]) -> Scorer:
    """Raises ValueError where it was learned on other features."""
    if tuple(found["weights"]) != FEATURES:
        raise ValueError("complexity.json was learned on other features: run benchmarks/model_routing.py --train")
    weights = tuple(float(weight) for weight in found["weights"].values())
    return Scorer(found["version"], weights, float(found["bias"]), tuple(map(float, found["quantiles"])))


class Complexity:
    """Small or large, for the rules of this configuration."""

    def __init__(self, scorer: Scorer, doubts: Doubts) -> None:
        self._scorer = scorer
        self._doubts = doubts
        self._recent: dict[str, Recent] = {}
        self._similar: dict[str, Similar] = {}

    def is_hard(self, rule: str, config: ComplexityConfig, source: pb.Input, *, learn: bool) -> tuple[bool, str]:
        """Whether the large model is to answer, by the prompt's look, and why. `rule` names whose recent prompts count,
        if they do; they count this one only where it is to `learn`."""
        score = self._scorer.score(source)
        if config.signal != "prompt":  # it stands in: what is configured and what was seen are of another signal
            config, learn = replace(config, threshold=None, calibration="training"), False
        threshold, basis = self._threshold(rule, config, self._scorer)
        if learn and config.calibration == "recent":
            self._recent.setdefault(rule, Recent()).note(score)
        return score > threshold, _why("score", score, threshold, basis)

    def is_doubtful(self, rule: str, config: ComplexityConfig, source: pb.Input, doubt: float) -> tuple[bool, str]:
        """Whether the large model is to take over from a small one in such doubt, and why. The rule learns from it."""
        look = features(source) if config.calibration == "similar" else []
        threshold, basis = self._threshold(rule, config, self._doubts, look)
        if config.calibration == "similar":
            self._similar.setdefault(rule, Similar(len(look))).note(look, doubt)
        elif config.calibration == "recent":
            self._recent.setdefault(rule, Recent()).note(doubt)
        return doubt > threshold, _why("doubt", doubt, threshold, basis)

    def outlook(self, rule: str, config: ComplexityConfig, source: pb.Input) -> str:
        """What the small model's beginning will be measured by."""
        look = features(source) if config.calibration == "similar" else []
        threshold, basis = self._threshold(rule, config, self._doubts, look)
        return f"begins; stays where it doubts its first {config.first_tokens} tokens up to {threshold:.3f} ({basis})"

    def _threshold(
        self, rule: str, config: ComplexityConfig, known: Scorer | Doubts, look: Sequence[float] = ()
    ) -> tuple[float, str]:
        share = config.small_share
        if config.threshold is not None:
            return config.threshold, "as configured"
        if share == 0:
            return -1.0, "all go to the large"
        if share == 1:
            return 2.0, "all go to the small"
        found = None
        if config.calibration == "similar" and rule in self._similar:
            found = self._similar[rule].threshold(look, share)
        elif config.calibration == "recent" and rule in self._recent:
            found = self._recent[rule].threshold(share)
        if found is not None:
            return found, f"{share:.0%} of {config.calibration} requests are small"
        return known.threshold(share), f"{share:.0%} of {known.version} are small"


def _why(what: str, score: float, threshold: float, basis: str) -> str:
    return f"{what} {score:.3f} {'above' if score > threshold else 'up to'} {threshold:.3f} ({basis})"
