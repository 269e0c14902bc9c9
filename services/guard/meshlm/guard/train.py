"""`python -m meshlm.guard.train`: make the embedded model from packaged data.

Needs the extra `guard-train`. The same data, numpy and processor give the same artefact: nothing is drawn by lot.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshlm.guard import artefact, ngrams
from meshlm.guard.artefact import Artefact
from meshlm.guard.embedded import EmbeddedModel
from meshlm.guard.judging import Head
from meshlm.guard.ngrams import Layout
from meshlm.guard.training import benchmarks, heads, held_out
from meshlm.guard.training.duplicates import Sieve, without_duplicates
from meshlm.guard.training.examples import CATEGORIES, Example, Split
from meshlm.guard.training.heads import Candidate, Fitted
from meshlm.guard.training.packages import DataError
from meshlm.guard.training.sources import SOURCES, examples

# Chosen from by recall at 1% false positives, the mean of both heads: of attacks on the held-out sources, where there
# are any, and of harm on the validation split.
_ATTACK: dict[str, Any] = {"attack_penalty": 3e-5, "attack_iterations": 60, "balance": 0.4}
CANDIDATES = (
    Candidate("words", Layout(chars=1, words=2, bits=18), penalty=1e-3, **_ATTACK),
    Candidate("words and characters", Layout(chars=5, words=2, bits=18), penalty=1e-3, **_ATTACK),
)
_HEADS: tuple[Head, ...] = ("attack", "harm")
_Tried = tuple[Candidate, dict[Head, Fitted], dict[Head, dict[str, float]]]


def train(
    data: Sequence[Example], candidates: Sequence[Candidate] = CANDIDATES, sieve: Sieve | None = None
) -> Artefact:
    """The artefact of examples without duplicates: the best candidate, calibrated, with its card."""
    splits = _deciding(data)
    tried: list[_Tried] = []
    for candidate in candidates:
        fitted = {head: _fitted(head, data, candidate, tried) for head in _HEADS}
        model = EmbeddedModel(heads.empty(candidate.layout, fitted["attack"], fitted["harm"]))
        reached = {head: heads.quality(head, model, data, splits[head]) for head in _HEADS}
        tried.append((candidate, fitted, reached))
        _say(f"{candidate.name}: {_spelled(reached)}")
    candidate, fitted, _ = max(tried, key=lambda entry: sum(q["recall_at_1_percent"] for q in entry[2].values()))
    model = EmbeddedModel(heads.empty(candidate.layout, fitted["attack"], fitted["harm"]))
    final = {head: heads.calibrated(head, fitted[head], model, data) for head in _HEADS}
    table, numbers = heads.categories(data, candidate.layout)
    judged = EmbeddedModel(heads.empty(candidate.layout, final["attack"], final["harm"]))
    card = {
        **numbers,
        "format": artefact.FORMAT,
        "ngrams": ngrams.VERSION,
        "layout": {"chars": candidate.layout.chars, "words": candidate.layout.words, "bits": candidate.layout.bits},
        "heads": {head: final[head].numbers for head in _HEADS},
        "categories": list(CATEGORIES),
        "chosen": candidate.name,
        "decided_on": splits,
        "validation": {entry.name: reached for entry, _, reached in tried},
        "held_out": heads.by_source("attack", judged, data, "held-out"),
        "test": {head: heads.quality(head, judged, data, "test") for head in _HEADS},
        "data": _data_card(data, sieve or Sieve()),
    }
    _say(f"chosen: {candidate.name}; test: {_spelled(card['test'])}")
    return Artefact(final["attack"].weights, final["harm"].weights, table, card)


def _deciding(data: Sequence[Example]) -> dict[Head, Split]:
    """The split that a head's candidates are compared on."""
    labels = {example.attack for example in data if example.split == "held-out"}
    return {"attack": "held-out" if {True, False} <= labels else "validation", "harm": "validation"}


def _fitted(head: Head, data: Sequence[Example], candidate: Candidate, tried: Sequence[_Tried]) -> Fitted:
    """A head, of an earlier candidate where it is the same."""
    for earlier, known, _ in tried:
        if earlier.of(head) == candidate.of(head):
            return known[head]
    return heads.fit(head, data, candidate)


def _data_card(data: Sequence[Example], sieve: Sieve) -> dict[str, Any]:
    """Sources, licences, sizes and splits, and how many duplicates were taken out."""
    sizes: dict[str, Counter[str]] = {}
    for example in data:
        count = sizes.setdefault(example.source, Counter())
        count[example.split] += 1
        for head, label in (("attack", example.attack), ("harm", example.harm)):
            if label:
                count[head] += 1
    return {
        "packages": [
            {"requirement": p.requirement, "sha256": p.sha256, "licence": p.licence}
            for p in dict.fromkeys(source.package for source in SOURCES)
        ],
        "sources": {name: dict(sorted(count.items())) for name, count in sorted(sizes.items())},
        "exact_duplicates": sieve.exact,
        "near_duplicates": sieve.near,
        "like_benchmarks": sieve.barred,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(prog="meshlm.guard.train", description="Make the guard's embedded model.")
    packaged = Path(artefact.__file__).with_name("embedded.npz")
    parser.add_argument("--out", type=Path, default=packaged, help="the artefact's file (default: the guard's own)")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    try:
        kept, sieve = without_duplicates([*examples(), *held_out.examples()], benchmarks.sieve())
    except DataError as error:
        sys.stderr.write(f"meshlm.guard.train: {error}\n")
        return 1
    except ModuleNotFoundError as error:
        sys.stderr.write(f"meshlm.guard.train: {error.name} is missing: install the extra `guard-train`\n")
        return 1
    _say(f"{len(kept)} texts; {sieve.exact} exact and {sieve.near} near duplicates taken out, and {sieve.barred} "
         "that resemble a benchmark")  # fmt: skip
    made = train(kept, sieve=sieve)
    artefact.save(made, options.out)
    size = options.out.stat().st_size
    _say(f"{options.out}: {made.version}, {size / 1e6:.2f} MB, {time.monotonic() - begun:.0f} s")
    return 0


def _spelled(figures: dict[Any, dict[str, float]]) -> str:
    return "; ".join(
        f"{head} AUC {values['auc']:.4f}, recall {values['recall_at_1_percent']:.1%} at 1% FP, calibration off by "
        f"{values['calibration_error']:.3f}"
        for head, values in figures.items()
    )


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
