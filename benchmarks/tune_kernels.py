"""Searches for this device's best launch configurations, by coordinate descent from the defaults, and writes them into
`kernels/meshlm/kernels/gpu/tuned/<device>.json`, which is checked in; serving only reads it.

A configuration counts where its result is that of the default, and where it is faster by more than two runs differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import torch
from harness import ROOT, option_parser
from kernel_cases.case import Case, Plan, Work
from kernel_cases.measure import distance_of, timed

sys.path.insert(0, str(ROOT / "kernels"))  # a GPU machine has the repository, not the package

from meshlm.kernels.gpu.configs import Config, device_file, trying

FOLDER = ROOT / "kernels/meshlm/kernels/gpu/tuned"
GAIN = 0.03  # less is noise
# By kernel: which cases it shows in, and the values to try of each of its parameters.
SPACES: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "quant_matmul": (
        "matmul",
        "matmul",
        {
            "BN": (32, 64, 128, 256),
            "STEP": (64, 128, 256),
            "STAGES": (2, 3, 4, 5),
            "PROGRAMS": (1, 2, 4, 8),
            "num_warps": (4, 8),
        },
    ),
    "paged_attention": (
        "attention",
        "decode attention",
        {
            "TILE": (16, 32, 64, 128),
            "WAVES": (1, 2, 4, 8, 16),
            "num_stages": (2, 3, 4),
            "num_warps": (2, 4, 8),
        },
    ),
    "prefill_attention": (
        "attention",
        "prefill attention",
        {"ROWS": (64, 128), "TILE": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
    ),
    "prefill_attention_hopper": (
        "attention",
        "prefill attention",
        {
            "ROWS": (64, 128),
            "TILE": (32, 64, 128),
            "SPECIALIZED": (0, 1),
            "PROGRAMS": (1, 2),
            "num_stages": (2, 3, 4),
            "num_warps": (4, 8),
        },
    ),
    "sample": (
        "sampling",
        "sample top",
        {"GROUP": (8, 16, 32), "CANDIDATES": (1024, 2048, 4096), "num_warps": (4, 8, 16)},
    ),
}


class Search:
    """One kernel in one case."""

    def __init__(self, kernel: str, work: Work, runs: int) -> None:
        self.kernel, self._work, self._runs = kernel, work, runs
        self._seen: dict[tuple[tuple[str, int], ...], float] = {}
        with trying(kernel, {}) as trial:
            self._wanted = work.ours(0)
        self.asked = dict(trial.asked)

    def seconds(self, config: Config) -> float:
        """Infinite where a configuration cannot be launched, or gives another result."""
        name = tuple(sorted(config.items()))
        if name not in self._seen:
            self._seen[name] = self._measured(config)
        return self._seen[name]

    def _measured(self, config: Config) -> float:
        try:
            with trying(self.kernel, config):
                distance = distance_of(self._work.ours(0), self._wanted)
                if distance is not None and not distance < 0.01:
                    return float("inf")
                return statistics.median(timed(self._work.ours, self._work.sets, self._runs))
        except Exception as error:  # Triton raises of all kinds: too much shared memory, shapes that it has no way for
            if "CUDA error" in str(error):  # the device is gone for this process
                raise
            return float("inf")

    def descend(
        self, default: Config, space: Mapping[str, tuple[int, ...]], until: float
    ) -> tuple[Config, float, float]:
        """The best found, its seconds, and the default's."""
        best, before = dict(default), self.seconds(default)
        fastest = before
        improved = True
        while improved and time.monotonic() < until:
            improved = False
            for parameter in (name for name in space if name in best):
                for value in space[parameter]:
                    found = self.seconds(best | {parameter: value})
                    if found < fastest * (1 - GAIN):
                        best, fastest, improved = best | {parameter: value}, found, True
        return best, fastest, before


def cases_of(kernel: str, plan: Plan, match: str) -> Iterator[Case]:
    kind, prefix, _ = SPACES[kernel]
    for case in import_module(f"kernel_cases.{kind}").cases(plan):
        if prefix in case.name and match in case.name:
            yield case


def tune(kernel: str, plan: Plan, options: argparse.Namespace, until: float) -> dict[str, Config]:
    """By key, what is better than the default."""
    found: dict[str, Config] = {}
    done: set[tuple[int, ...]] = set()
    for case in cases_of(kernel, plan, options.match):
        if time.monotonic() > until:
            print(f"{case.name}: the time was over")
            continue
        search = Search(kernel, case.prepare(), 3 if options.quick else 7)
        for key, default in search.asked.items():
            if key in done:
                continue
            done.add(key)
            best, fastest, before = search.descend(default, SPACES[kernel][2], until)
            changed = {name: value for name, value in best.items() if default.get(name) != value}
            print(f"{case.name}: {before * 1e6:.4g} us, best {fastest * 1e6:.4g} us {changed}", flush=True)
            if changed:
                found[",".join(map(str, key))] = changed
        del search
        gc.collect()
        torch.cuda.empty_cache()
    return found


def write(path: Path, kernel: str, found: Mapping[str, Config]) -> None:
    """Into what is there of other kernels and shapes."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[kernel] = dict(sorted((known.get(kernel, {}) | dict(found)).items()))
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--kernels", nargs="*", default=list(SPACES), choices=list(SPACES), help="only these")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=3600.0, help="ends the search after so long")
    parser.add_argument("--file", type=Path, metavar="FILE", help="write there in place of the checked-in file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not tuned: no CUDA device")
        return
    device = torch.device("cuda")
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    plan = Plan(options.quick, device, torch.cuda.mem_get_info()[0] // 5, cache)
    path = options.file or FOLDER / device_file(torch.cuda.get_device_name(device))
    until = time.monotonic() + options.seconds
    for kernel in options.kernels:
        write(path, kernel, tune(kernel, plan, options, until))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
