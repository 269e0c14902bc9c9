"""The guard's `languages`: whom it takes for another language by mistake, whom it lets through, and what that costs.

Texts are Django's translations in 31 languages, by their number of letters. Wrongly refused: a policy that wants the
text's own language refuses it. Let through: a policy that wants English lets a text of another language pass. The peer
is the same detector's first choice taken at its word, at any length.
"""

from __future__ import annotations

import statistics
import sys
import time
from random import Random

from entropy_data.packaged import LANGUAGES, translations
from harness import Row, options, report
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from meshlm.guard.languages import LETTERS, detect
from meshlm.guard.training.sources import DJANGO

PEER = "the first choice"
SIZES = ((8, LETTERS), (LETTERS, 40), (40, 80), (80, 400))
CODES = {"nb": "no", "pt_BR": "pt", "zh_Hans": "zh", "zh_Hant": "zh"}


def texts(most: int) -> list[tuple[str, int, str]]:
    """Code of the language, number of letters, and text; up to so many a language."""
    found = []
    for language in LANGUAGES:
        said = list(dict.fromkeys(translations(DJANGO, language)))
        Random(language).shuffle(said)
        found += [(CODES.get(language, language), sum(map(str.isalpha, text)), text) for text in said[:most]]
    return found


def share(hits: list[bool]) -> float:
    return 100 * sum(hits) / len(hits)


def main() -> int:
    chosen = options(__doc__ or "")
    told = texts(100 if chosen.quick else 2_000)
    peer = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    detect(" ".join(text for _, _, text in told[:10]), ("en",))  # read the model
    rows, taken = [], []
    for least, most in SIZES:
        wrong: tuple[list[bool], list[bool]] = ([], [])
        passed: tuple[list[bool], list[bool]] = ([], [])
        for code, letters, text in told:
            if not least <= letters < most:
                continue
            first = peer.classify(text)[0]
            wrong[0].append(bool(detect(text, (code,))))
            wrong[1].append(first not in (code, "zxx"))
            begun = time.perf_counter()
            foreign = detect(text, ("en",))
            if letters >= LETTERS:
                taken.append((time.perf_counter() - begun) * 1e6)
            passed[0].append(not foreign)
            passed[1].append(first in ("en", "zxx"))
        for name, (ours, theirs) in (("wrongly refused", wrong), ("another language, let through", passed)):
            figure = f"{name}, {least} to {most} letters"
            rows.append(Row(figure, "%", share(ours), len(ours), 0.0, PEER, share(theirs)))
    rows.append(Row(f"a text of {LETTERS} letters or more", "us", statistics.median(taken), len(taken), 0.0))
    report("languages", rows, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
