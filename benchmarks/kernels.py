"""The GPU's kernels on this device: first whether they are right, then their times beside the limit's and torch's.

The limit is the bytes that must move over a copy's bandwidth, or the operations over the rate of a large product,
whichever takes longer, both measured in the same run. Shapes are of Llama 3 8B, and of 70B over 8 devices. Buffers are
rotated so that the L2 cache holds nothing of the call before; calls are replayed as CUDA graphs, as decode does it.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch
from harness import ROOT, option_parser, report
from kernel_cases.case import Case, Plan
from kernel_cases.measure import Ceilings, Measured, ceilings, measure
from kernel_cases.report import heading, page, rows_of, table, verdict

sys.path.insert(0, str(ROOT / "kernels"))  # a GPU machine has the repository, not the package

KINDS = ("attention", "matmul", "elementwise", "sampling", "adapters", "experts", "quantizers")


def correctness() -> tuple[bool, str]:
    """Runs the kernels' tests on this device. Whether all hold, and pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/kernels/gpu")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = result.stdout.strip().splitlines() or [f"pytest ended with {result.returncode}"]
    if result.returncode != 0:
        print("\n".join(lines[-60:]), result.stderr[-2000:], sep="\n", file=sys.stderr)
    return result.returncode == 0, lines[-1].strip("= ")


def chosen_cases(kinds: Iterable[str], plan: Plan, match: str, absent: dict[str, str]) -> Iterator[Case]:
    """Those whose name contains `match`. A kind whose kernels cannot be imported is noted as absent."""
    for kind in kinds:
        try:
            found = list(import_module(f"kernel_cases.{kind}").cases(plan))
        except ImportError as error:
            absent[kind] = f"{type(error).__name__}: {error}"
            continue
        yield from (case for case in found if match in case.name)


def measure_all(options: argparse.Namespace, begun: float) -> tuple[list[Measured], dict[str, str], Ceilings]:
    """Prints each case as it is measured."""
    limits = ceilings()
    print(heading(limits), flush=True)
    device = torch.device("cuda")
    plan = Plan(
        options.quick, device, memory=torch.cuda.mem_get_info()[0] // 5,
        cache=torch.cuda.get_device_properties(device).L2_cache_size,
    )  # fmt: skip
    measured: list[Measured] = []
    absent: dict[str, str] = {}
    for case in chosen_cases(options.kinds, plan, options.match, absent):
        if options.seconds is not None and time.monotonic() - begun > options.seconds:
            absent[case.name] = "the time was over"
            continue
        try:
            measured.append(measure(case, limits, 7 if options.quick else 15))
        except Exception as error:  # a kernel that fails at one shape: the others are measured all the same
            absent[case.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"{case.name}: not measured: {absent[case.name]}", flush=True)
        else:
            print(table(measured[-1:]).splitlines()[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return measured, absent, limits


def page_file(asked: Path, name: str) -> Path:
    """Where `--page` writes; without a name by device and date."""
    if asked != Path():
        return asked
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return ROOT / f"benchmarks/results/kernels_{device}_{datetime.now(UTC).date():%Y%m%d}.md"


def arguments() -> argparse.Namespace:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--page", type=Path, nargs="?", const=Path(), metavar="FILE",
                        help="write the page, by default benchmarks/results/kernels_<device>_<date>.md")  # fmt: skip
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="only these kinds of operation")
    parser.add_argument("--untested", action="store_true", help="without the correctness suite")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin no further case after so long")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print("not measured: no CUDA device")
        return 0
    begun = time.monotonic()
    right, tests = (True, "not run") if options.untested else correctness()
    print(f"correctness: {tests}", flush=True)
    if not right:
        return 1
    measured, absent, limits = measure_all(options, begun)
    print(verdict(measured))
    name = torch.cuda.get_device_name()
    report("kernels", rows_of(measured), options.json, gpu=name, not_measured=absent)
    if options.page is not None:
        command = shlex.join(["python", *sys.argv])
        page_file(options.page, name).write_text(page(measured, limits, absent, command, tests))
    return 1 if any(one.wrong for one in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
