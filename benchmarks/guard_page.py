"""The rows of `guard.py` as the tables of its page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import harness
from harness import Row

_FIGURE = re.compile(r"(attack|harm), (.*): (AUC|F1 at 0\.5|recall at 1% FP|recall at 5% FP) \((.*) to (.*)\)$")
_COLUMNS = ("AUC", "F1 at 0.5", "recall at 1% FP", "recall at 5% FP")
_TITLES = {"attack": "Prompt attacks", "harm": "Harmful content"}


def page(rows: Sequence[Row], version: str) -> str:
    """All tables, in Markdown."""
    parts = [f"Model `{version}`; {harness.device()}; commit {harness.commit()}.\n"]
    for head, title in _TITLES.items():
        parts.append(_head_table(head, title, rows))
    for head, title in (("attack", "kind of attack"), ("harm", "source, category")):
        kinds = [row for row in rows if row.name.startswith(f"{head}, of kind ")]
        names = [row.name.removeprefix(f"{head}, of kind ").rpartition(":")[0] for row in kinds]
        lines = [
            f"| {name} | {row.value:.0%} | {row.peer_value or 0:.0%} | {row.n} |"
            for name, row in zip(names, kinds, strict=True)
        ]
        parts.append(_table((title, "model at 1% FP", "refused by the default policy", "texts"), lines))
    shares = [row for row in rows if row.name.startswith(("over-refusal", "stopped"))]
    parts.append(
        _table(("the default policy", "share", "texts"), [f"| {r.name} | {r.value:.1%} | {r.n:,} |" for r in shares])
    )
    rest = [row for row in rows if row.name.startswith("time") or "calibration" in row.name or "share of" in row.name]
    lines = [f"| {r.name} | {r.value:.3g} {r.unit} | {r.n:,} |".replace("  |", " |") for r in rest]
    parts.append(_table(("", "", "texts or runs"), lines))
    return "\n".join(parts)


def _head_table(head: str, title: str, rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], dict[str, str]] = {}
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        match = _FIGURE.match(row.name)
        if match is None or match[1] != head:
            continue
        value = row.value if row.peer_value is None else row.peer_value
        key = (match[2], row.peer or "model")
        found.setdefault(key, {})[match[3]] = f"{value:.3f} ({match[4]} to {match[5]})"
        counts[key] = row.n
    lines = [
        f"| {name} | {system} | {counts[name, system]:,} | {' | '.join(cells[column] for column in _COLUMNS)} |"
        for (name, system), cells in found.items()
    ]
    return f"### {title}\n\n" + _table(("texts of", "judged by", "texts", *_COLUMNS), lines)


def _table(titles: Sequence[str], lines: Iterable[str]) -> str:
    return "\n".join((f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *lines)) + "\n"
