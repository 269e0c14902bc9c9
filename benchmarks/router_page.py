"""The rows of `router.py` as its page in `results/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime

import harness
from harness import Row

_GOAL = re.compile(r"([<>]) ([\d.]+)( times)?")
_QUIET = 0.7  # load of a machine that has nothing else to do
_BUSY = """\
Other work had the cores meanwhile (load {load:.1f} before it began): compare values with their peer and limit, which
had to share as much, and not with goals.
"""
_TEXT = """\
Client, router, engine and whoever stands beside them share the cores, so latencies are upper bounds. The engine has a
fixed token rate (`benchmarks/peers/fixed_engine.py`); requests of 8 messages for "requests", a token a message for
"chunks", 16 for "tokens". LiteLLM's proxy 1.108.7, one process, stands before the same engine. "Limit" is a process
that only passes bytes from one gRPC call of Python to another (`benchmarks/peers/bare_proxy.py`), in the same run: what
is above it is the router's own.

`_guard_cache`: with the guard, its embedded model judging in strict mode, and the cache. Text then waits for the
guard's first window of 16 tokens, by policy: the figure counts from the moment at which the engine has filled it, and
`window_wait` says how long that takes the engine. With prompts of 50,000 tokens, it is the guard reading them.

Where the time goes, and what was tried: docs/router-cost.md.
"""


def page(rows: Sequence[Row], *, quick: bool, load: float) -> str:
    """All of it, in Markdown. `load`: of the machine before it began."""
    rounds = max(row.n for row in rows)
    command = "benchmarks/router.py" + (" --quick" if quick else "")
    lines = [
        f"# The router, {datetime.now(UTC).date().isoformat()}\n",
        f"```\n.venv/bin/python {command} --page FILE\n```\n",
        f"{harness.device()}; commit {harness.commit()}; {rounds} round{'s' * (rounds > 1)} of each figure.\n",
        *([_BUSY.format(load=load)] if load > _QUIET else []),
        _TEXT,
        "| figure | value | spread | beside it, in the same run | ratio | limit | goal |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *map(_line, rows),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    peer = f"{_number(row.peer_value)} ({row.peer})" if row.peer_value is not None else ""
    ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
    limit = _number(row.limit) if row.limit is not None else ""
    value = f"{_number(row.value)} {row.unit}".removesuffix(" 1/s")
    spread = f"{row.spread:.0%}" if row.n > 1 else ""
    cells = (row.name, value, spread, peer, ratio, limit, goal_of(row))
    return f"| {' | '.join(cells)} |".replace("  ", " ")


def goal_of(row: Row) -> str:
    """The goal, and whether it was reached: by the value, or by the ratio where it says times."""
    match = _GOAL.match(row.goal)
    if match is None:
        return row.goal
    found = row.ratio if match[3] else row.value
    assert found is not None  # a goal of so many times has a peer
    reached = found < float(match[2]) if match[1] == "<" else found > float(match[2])
    return f"{row.goal}: {'reached' if reached else 'not reached'}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
