"""What every benchmark shares: its command line, its table, its JSON, and a virtual environment for its peers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Row:
    """One figure, beside its peer or its limit from the same run."""

    name: str
    unit: str
    value: float
    n: int  # runs behind the median
    spread: float  # (maximum - minimum) / median of the value's runs
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None  # value over peer_value, or the other way round where less is better
    limit: float | None = None
    goal: str = ""


def median(runs: Sequence[float]) -> float:
    return statistics.median(runs)


def spread(runs: Sequence[float]) -> float:
    return (max(runs) - min(runs)) / statistics.median(runs) if len(runs) > 1 else 0.0


def against(name: str, unit: str, ours: Sequence[float], peer: str, theirs: Sequence[float], *, goal: str = "",
            less_is_better: bool = False) -> Row:  # fmt: skip
    """A row from two lists of runs that were taken in turn."""
    value, other = median(ours), median(theirs)
    ratio = other / value if less_is_better else value / other
    return Row(name, unit, value, len(ours), spread(ours), peer, other, ratio, goal=goal)


def option_parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark; one may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer runs: under two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def options(description: str) -> argparse.Namespace:
    return option_parser(description).parse_args()


def report(theme: str, rows: Sequence[Row], file: Path | None, **more: Any) -> None:
    """Print the table; write the JSON, with `more` beside the rows."""
    widths = (52, 10, 10, 34, 10, 8)
    print(_line(("figure", "value", "spread", "peer", "peer", "ratio"), widths))
    for row in rows:
        peer_value = "" if row.peer_value is None else f"{row.peer_value:.4g}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = (f"{row.name} [{row.unit}]", f"{row.value:.4g}", f"{row.spread:.0%}", row.peer, peer_value, ratio)
        print(_line(cells, widths) + (f"  goal: {row.goal}" if row.goal else ""))
    if file is not None:
        whole = {"theme": theme, "device": device(), "commit": commit(), "rows": [asdict(row) for row in rows]}
        whole |= more
        file.write_text(json.dumps(whole, indent=2) + "\n")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return " ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def device() -> str:
    """The processor, its cores that this process may use, and how busy the machine was."""
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}"


def commit() -> str:
    result = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip()


class Peer:
    """Another implementation in a process of its own, in an environment of its own: a JSON line in, a JSON line out.

    `log`: where its standard error goes, instead of ours.
    """

    def __init__(
        self, script: str, requirements: Sequence[Sequence[str]], *arguments: str, log: Path | None = None
    ) -> None:
        python = environment(Path(script).stem, requirements)
        command = [str(python), str(ROOT / "benchmarks/peers" / script), *arguments]
        with log.open("w") if log is not None else nullcontext() as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        self.ready = self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def pause(self) -> None:
        """Stop all of its threads: threads that spin while they wait would slow down whoever is measured next."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it, paused or not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.poll() is None:
            self.resume()
        self._process.wait(30)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with code {self._process.wait(30)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def peak_memory(pid: int) -> int:
    """The most bytes of memory that the process and its children held; the sum of each one's own peak."""
    process = Path("/proc") / str(pid)
    peak = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
    children = {
        int(child) for task in (process / "task").iterdir() for child in (task / "children").read_text().split()
    }
    return int(peak.split()[1]) * 1024 + sum(peak_memory(child) for child in children)


def environment(name: str, requirements: Sequence[Sequence[str]]) -> Path:
    """The interpreter of a peer's environment, made on the first use. Each list is one call of pip, in order."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin/python"
    stamp = folder / ".installed"
    wanted = json.dumps(requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing the peer {name} into {folder.name} ...", file=sys.stderr)
        venv.create(folder, with_pip=True, symlinks=True)
        for packages in requirements:
            subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *packages], check=True)
        stamp.write_text(wanted)
    return python
