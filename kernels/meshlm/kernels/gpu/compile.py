"""Compiles what serving runs, for GPUs that need not be there: `python -m meshlm.kernels.gpu.compile`.

Every module of this package that has `variants()` is asked for them. Exits with 1 where one does not compile, needs
more shared memory than a block can have, or, being hot, spills registers.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from meshlm.kernels import gpu
from meshlm.kernels.gpu.capabilities import SHARED_LIMIT
from meshlm.kernels.gpu.variants import ARCHITECTURES, Variant

_INSTRUCTIONS = {  # of PTX
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "TMA": "cp.async.bulk.tensor",
    "cp.async": "cp.async.c",
}


@dataclass(frozen=True, slots=True)
class Job:
    module: str
    variant: str
    architecture: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came of a job. registers: of a thread; spills: instructions that store to local memory; shared: bytes of a
    block; instructions: the notable ones; problem: why it may not be served, or empty."""

    job: Job
    problem: str
    seconds: float = 0.0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    instructions: tuple[str, ...] = ()


def modules() -> Iterator[str]:
    """The modules of this package that say what serving compiles of them."""
    for found in pkgutil.iter_modules(gpu.__path__, prefix=f"{gpu.__name__}."):
        if found.name != __name__ and hasattr(importlib.import_module(found.name), "variants"):
            yield found.name


@cache
def variants_of(module: str) -> dict[str, Variant]:
    """By name. Raises ValueError: two of one name."""
    found: dict[str, Variant] = {}
    for variant in importlib.import_module(module).variants():
        if variant.name in found:
            raise ValueError(f"{module} has two variants named {variant.name!r}")
        found[variant.name] = variant
    return found


def jobs(architectures: Iterable[int], match: str) -> list[Job]:
    """Of all variants whose name contains `match`."""
    return [
        Job(module, variant.name, architecture)
        for module in modules()
        for variant in variants_of(module).values()
        for architecture in architectures
        if match in variant.name and architecture in variant.architectures
    ]


def compile_variant(job: Job) -> Compiled:
    """Never raises for what is wrong with the variant."""
    variant = variants_of(job.module)[job.variant]
    begun = time.perf_counter()
    try:
        kernel = _compile(variant, job.architecture)
    except Exception as error:  # Triton and LLVM raise of all kinds; each is the answer
        return Compiled(job, " ".join(f"{type(error).__name__}: {error}".split())[:400], time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    registers, spills = _resources(kernel.asm["cubin"])
    shared, limit = kernel.metadata.shared, SHARED_LIMIT[job.architecture]
    problem = ""
    if shared > limit:
        problem = f"needs {shared} bytes of shared memory, a block has {limit}"
    elif spills and variant.hot:
        problem = f"spills registers: {spills} stores to local memory"
    seen = tuple(name for name, opcode in _INSTRUCTIONS.items() if opcode in kernel.asm["ptx"])
    return Compiled(job, problem, seconds, registers, spills, shared, seen)


def _compile(variant: Variant, architecture: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constants = {}
    for index, name in enumerate(variant.kernel.arg_names):
        if name in variant.constants:
            signature[name], constants[name] = "constexpr", variant.constants[name]
            continue
        signature[name], _, divisor = variant.types[name].partition(":")
        if divisor:
            attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(variant.options))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and instructions that store to local memory."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"\bREG:(\d+)", text)
    return int(registers[1]) if registers else 0, len(re.findall(r"\bSTL\b", text))


def _line(compiled: Compiled) -> str:
    job = compiled.job
    figures = f"{compiled.registers:4d} {compiled.spills:6d} {compiled.shared / 1024:7.1f} {compiled.seconds:7.1f}"
    return f"{job.variant:64s} {job.architecture:4d} {figures}  {' '.join(compiled.instructions)}"


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile every kernel that serving runs, without a GPU.")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--match", default="", metavar="NAME", help="only variants whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _arguments(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # read when the modules of kernels are imported, below
    wanted = jobs(options.architectures, options.match)
    if not wanted:
        print(f"no variant's name contains {options.match!r}", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what every Triton up to 3.9 does, but 3.9 warns of
    begun, problems = time.perf_counter(), []
    print(f"{'variant':64s} {'sm':>4s} {'regs':>4s} {'spills':>6s} {'KB':>7s} {'seconds':>7s}  instructions")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")  # what was compiled before proves nothing
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            for compiled in pool.map(compile_variant, wanted):
                print(_line(compiled), flush=True)
                if compiled.problem:
                    print(f"    {compiled.problem}", flush=True)
                    problems.append(compiled)
    print(f"{len(wanted)} compiled in {time.perf_counter() - begun:.0f} s, {len(problems)} with problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
