"""The figures of `engine.py` as rows, as a table of all peers, and as the page for `results/`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from harness import Row, against, commit, device, median, spread
from workload import FIGURES

OURS = "MeshLM"
# The rows that the issue names: figure, goal. Each is held against the best peer, `decode_b1` against llama.cpp.
GOALS = {
    "decode_b1": "3x llama.cpp at the same bits",
    "prefill_512": "1.5x the best peer",
    "concurrent_16": "3x the best peer",
    "ttft_p99_16": "the lowest",
    "shared_prefix_16_cold": "3x the best peer",
    "shared_prefix_16": "3x the best peer",
    "stall_2000": "half the best peer's",
    "tpot_p99_over_median_2000": "under 2",
}
# Bits a weight of llama.cpp's files: Q4_1 with the embedding in Q8_0, and all Q8_0.
LLAMA_CPP_BITS = {"llama.cpp Q4_1": 5.7, "llama.cpp Q8_0": 8.5}


@dataclass
class Results:
    """Everything measured: the runs of each figure of each implementation, and why others are missing."""

    runs: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    unable: dict[tuple[str, str], str] = field(default_factory=dict)  # (peer, case): why it is not measured
    absent: dict[str, str] = field(default_factory=dict)  # peers that did not install or start, and why
    memory: dict[str, int] = field(default_factory=dict)  # bytes at the peak
    versions: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            self.runs[name][figure].append(value)

    def best_peer(self, figure: str, among: Sequence[str] = ()) -> str | None:
        """The peer with the best median."""
        names = [name for name in among or self.runs if name != OURS and self.runs.get(name, {}).get(figure)]
        better = min if FIGURES[figure][1] else max
        return better(names, key=lambda name: median(self.runs[name][figure]), default=None)


def rows_of(results: Results, bits: float) -> list[Row]:
    """Our rows, each against its peer. `bits` a weight of ours decide which llama.cpp decodes beside us."""
    same_bits = min(LLAMA_CPP_BITS, key=lambda name: abs(LLAMA_CPP_BITS[name] - bits))
    rows = []
    for figure, (unit, less_is_better) in FIGURES.items():
        runs, goal = results.runs[OURS][figure], GOALS.get(figure, "")
        peer = results.best_peer(figure, [same_bits] if figure == "decode_b1" else ())
        if peer is None:
            rows.append(Row(figure, unit, median(runs), len(runs), spread(runs), goal=goal))
        else:
            theirs = results.runs[peer][figure]
            rows.append(against(figure, unit, runs, peer, theirs, goal=goal, less_is_better=less_is_better))
    return rows


def peers_table(results: Results) -> str:
    """Every implementation and every figure, medians, as Markdown; and what is not there, with its reason."""
    lines = [
        "| | " + " | ".join(f"{figure}{f', {unit}' if unit else ''}" for figure, (unit, _) in FIGURES.items())
        + " | memory, MB |",
        "| --- " * (len(FIGURES) + 2) + "|",
    ]  # fmt: skip
    for name, runs in results.runs.items():
        cells = [f"{median(runs[figure]):.4g}" if runs.get(figure) else "-" for figure in FIGURES]
        lines.append(f"| {name} | {' | '.join(cells)} | {results.memory.get(name, 0) / 1e6:.0f} |")
    lines += ["", *(f"- {name}: not measured: {why}" for name, why in results.absent.items())]
    lines += [f"- {name}, {case}: not measured: {why}" for (name, case), why in results.unable.items()]
    return "\n".join(lines).rstrip() + "\n"


def as_json(results: Results) -> dict[str, Any]:
    """What the JSON holds beside the rows."""
    peers = {
        name: {"version": results.versions.get(name, ""), "memory_mb": results.memory.get(name, 0) / 1e6}
        | {figure: {"value": median(runs), "spread": spread(runs), "n": len(runs)} for figure, runs in figures.items()}
        for name, figures in results.runs.items()
    }
    reasons = results.absent | {f"{name}, {case}": why for (name, case), why in results.unable.items()}
    return {"peers": peers, "not_measured": reasons}


def page(rows: Sequence[Row], results: Results, command: str) -> str:
    """A page for `results/`, to which its author adds what the figures mean."""
    today = datetime.now(UTC).date()
    versions = "; ".join(f"{name}: {version}" for name, version in results.versions.items())
    lines = [
        f"# The engine beside its peers, {today}", "", "```", command, "```", "",
        f"SmolLM2-135M-Instruct, {device()}, 2 threads, commit {commit()}. {versions}.", "",
        "| figure | value | spread | peer | peer's value | ratio | goal |", "| --- " * 7 + "|",
    ]  # fmt: skip
    for row in rows:
        value = "" if row.peer_value is None else f"{row.peer_value:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        name = f"{row.name}, {row.unit}" if row.unit else row.name
        lines.append(f"| {name} | {row.value:.4g} | {row.spread:.0%} | {row.peer} | {value} | {ratio} | {row.goal} |")
    return "\n".join([*lines, "", "All figures, medians:", "", peers_table(results)])
