"""Which language a text is in, for policies that want certain ones only.

A detector's guess (py3langid: naive Bayes over byte n-grams, 139 languages; Lui and Baldwin 2012) refuses the wrong
people where it is not sure, so only long enough texts count, and only where nearly all probability lies on others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from meshlm.guard.findings import Finding

VERSION = "languages/1"
CATEGORY = "language.other"
# Fewer letters than this may be of any language: of 6,500 translated messages with this many or more, 0.1% are taken
# for another language than their own, of shorter ones 1% and more (benchmarks/languages.py).
LETTERS = 24
# Probability that a text is in none of the wanted languages from which it is refused.
SURE = 0.99
# Of a long text so many characters are read.
_READ = 8_192
# Identifiers, numbers and markup: no language.
_NONE = "zxx"
# The detector's name for what users may call otherwise (ISO 639-1).
_ALIASES = {"nb": "no"}


@cache
def _identifier() -> LanguageIdentifier:
    """Takes half a second and 60 MB: made for the first policy that asks for languages."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check(languages: Sequence[str]) -> None:
    """Raises ValueError for a language that the detector does not know."""
    known = set(_identifier().labels) if languages else set()
    for name in languages:
        if _ALIASES.get(name, name) not in known:
            raise ValueError(f"{name}: no language that the detector knows (as in en, de, zh)")


def detect(text: str, languages: Sequence[str]) -> list[Finding]:
    """One finding where a text is surely in none of these languages (codes of ISO 639)."""
    text = text[:_READ]
    if sum(character.isalpha() for character in text) < LETTERS:
        return []
    wanted = {_ALIASES.get(name, name) for name in languages} | {_NONE}
    other = 1.0 - sum(probability for label, probability in _identifier().rank(text) if label in wanted)
    return [Finding("language", CATEGORY, min(1.0, other), 0, len(text))] if other >= SURE else []
