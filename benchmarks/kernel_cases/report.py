"""Measurements as rows, as a table, and as the page for `results/`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

import torch
from harness import Row, commit, median, spread

from kernel_cases.measure import Ceilings, Measured

MICRO = 1e6


def rows_of(measured: Sequence[Measured]) -> list[Row]:
    """In microseconds; the peer is torch's fastest, or the one that the goal names."""
    rows = []
    for one in measured:
        peer = one.case.goal.peer or one.fastest() or ""
        theirs = one.peers.get(peer)
        value = None if theirs is None else median(theirs) * MICRO
        ours = [seconds * MICRO for seconds in one.ours]
        rows.append(
            Row(one.case.name, "us", median(ours), len(ours), spread(ours), peer, value, one.times(peer),
                limit=one.limit * MICRO, goal=str(one.case.goal))
        )  # fmt: skip
    return rows


def heading(limits: Ceilings) -> str:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, torch {torch.__version__}, triton"
        f" {triton.__version__}, commit {commit()}. Measured in this run: a copy reads and writes"
        f" {limits.bandwidth / 1e12:.2f} TB/s, an 8192-cubed product in bf16 makes {limits.flops / 1e12:.0f} TFLOP/s."
    )


def table(measured: Sequence[Measured]) -> str:
    """Markdown: every case with its limit, all its peers and its goal."""
    lines = [
        "| case | us | spread | limit, us | of the limit | torch, us | torch / ours | goal | |",
        "| --- " * 9 + "|",
    ]
    for one in measured:
        ordered = sorted(one.peers, key=lambda name: statistics.median(one.peers[name]))
        peers = ", ".join(f"{name} {statistics.median(one.peers[name]) * MICRO:.4g}" for name in ordered)
        times = one.times(one.fastest())
        reached = {True: "reached", False: "**missed**", None: ""}[one.reached]
        cells = (
            one.case.name, f"{one.seconds * MICRO:.4g}", f"{spread(one.ours):.0%}", f"{one.limit * MICRO:.4g}",
            f"{one.of_limit:.0%}", peers or "-", "-" if times is None else f"{times:.2f}", str(one.case.goal),
            "**wrong**" if one.wrong else reached,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shortfall(one: Measured) -> float:
    """How far below its goal a case is: 1 is on it, 0.5 half of it; infinite without a goal."""
    goal, parts = one.case.goal, [math.inf]
    if goal.of_limit is not None:
        parts.append(one.of_limit / goal.of_limit)
    if goal.times is not None and (times := one.times(goal.peer or one.fastest())) is not None:
        parts.append(times / goal.times)
    return min(parts)


def verdict(measured: Sequence[Measured]) -> str:
    """How many goals are reached, and the worst gap by name."""
    judged = [one for one in measured if one.reached is not None]
    if not judged:
        return "No case with a goal was measured."
    reached = sum(bool(one.reached) for one in judged)
    text = f"{reached} of {len(judged)} cases with a goal reach it."
    worst = min(judged, key=shortfall)
    if not worst.reached:
        text += f" The worst gap: {worst.case.name}, at {shortfall(worst):.0%} of its goal ({worst.case.goal})."
    return text


def page(measured: Sequence[Measured], limits: Ceilings, absent: dict[str, str], command: str, tests: str) -> str:
    """A page for `results/`, to which its author adds what the figures mean."""
    lines = [
        f"# GPU kernels, {datetime.now(UTC).date()}", "", "```", command, "```", "", heading(limits), "",
        f"Correctness on this device first: {tests}.", "", table(measured), "", verdict(measured), "",
    ]  # fmt: skip
    reasons = {f"{one.case.name}, {name}": why for one in measured for name, why in one.absent.items()} | absent
    lines += [f"- {name}: not measured: {why}" for name, why in reasons.items()]
    return "\n".join(lines).rstrip() + "\n"
