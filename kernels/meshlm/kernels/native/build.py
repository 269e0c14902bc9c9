"""Compile the native kernels, one shared library an instruction set: `python -m meshlm.kernels.native.build`.

All code of a library is compiled with the same flags: an inline function shared by several instruction sets would
otherwise be taken from whichever was linked first. Only the standard library is used here, for the wheel's build hook
loads this file by its path.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = FOLDER / "src"
UNBUILT = FOLDER / "_native_unbuilt.txt"  # why there is no library, for whoever asks for it later
JOBS = 2

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# From the fastest to the one that runs anywhere.
ISAS: dict[str, tuple[str, ...]] = {
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    "avx2": _AVX2,
    "generic": (),
}
# No contraction: a row's sum must not depend on how the compiler fused it for one batch size and not for another.
_COMPILE = ("-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fPIC", "-pthread")
# g++ 12 takes the "undefined" operand inside its own intrinsics for a mistake of ours (GCC bug 105593).
_WARN = ("-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi", "-Wno-unknown-warning-option")
_RELEASE = ("-O3",)
_SANITIZE = ("-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# A library carries its C++ runtime, so that a wheel built here loads on an older system.
_PORTABLE = ("-static-libstdc++", "-static-libgcc")
_MARK = re.compile(rb"meshlm-native-sources:([0-9a-f]+);")


class BuildError(RuntimeError):
    """The libraries could not be built; the text says why, for the user."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


def library_path(isa: str, sanitized: bool = False) -> Path:
    return FOLDER / f"_native_{isa}{'_sanitized' if sanitized else ''}.so"


def buildable_isas() -> tuple[str, ...]:
    """The instruction sets that can be compiled for on this kind of machine, the fastest first."""
    return tuple(ISAS) if platform.machine().lower() in ("x86_64", "amd64") else ("generic",)


def sources_hash() -> str:
    """Names the C++ sources and the flags they are compiled with."""
    digest = hashlib.sha256(repr((ISAS, _COMPILE, _RELEASE, _SANITIZE, _PORTABLE)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def built_hash(path: Path) -> str | None:
    """The hash of the sources that a library was built from; None if there is no such file or it is not ours."""
    try:
        found = _MARK.search(path.read_bytes())
    except FileNotFoundError:
        return None
    return found.group(1).decode() if found else None


def find_compiler() -> list[str]:
    """The compiler's command: $CXX, g++, or clang++. Raises NoCompilerError."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise NoCompilerError(f"the compiler that CXX names was not found: {named[0]}")
        return named
    for name in ("g++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise NoCompilerError("no C++ compiler was found (g++ or clang++; on Debian: apt install g++)")


def build(isas: Sequence[str] | None = None, *, sanitized: bool = False) -> list[Path]:
    """Compile what is missing or does not match the sources. Returns the paths of all libraries asked for.

    Raises NoCompilerError, or BuildError with the compiler's words. The reason is kept beside the libraries.
    """
    chosen = buildable_isas() if isas is None else isas
    wanted = sources_hash()
    stale = [isa for isa in chosen if built_hash(library_path(isa, sanitized)) != wanted]
    if stale:
        try:
            _compile(find_compiler(), stale, sanitized, wanted)
        except BuildError as error:
            UNBUILT.write_text(f"{error}\n")
            raise
    UNBUILT.unlink(missing_ok=True)
    return [library_path(isa, sanitized) for isa in chosen]


def _compile(compiler: list[str], isas: Sequence[str], sanitized: bool, sources: str) -> None:
    mode = _SANITIZE if sanitized else _RELEASE
    units = sorted(SOURCES.glob("*.cpp"))
    # In the package's own folder, so that the last step is a rename within a file system: nobody loads half a library.
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="_build_") as scratch, ThreadPoolExecutor(JOBS) as pool:
        folder = Path(scratch)

        def compile_unit(isa: str, unit: Path) -> None:
            target = folder / f"{isa}_{unit.stem}.o"
            flags = [*_COMPILE, *_WARN, *mode, *ISAS[isa], f'-DMESHLM_SOURCES="{sources}"']
            _run([*compiler, *flags, "-c", str(unit), "-o", str(target)])

        def link(isa: str) -> None:
            target = folder / f"{isa}.so"
            objects = [str(folder / f"{isa}_{unit.stem}.o") for unit in units]
            command = [*compiler, "-shared", "-pthread", *objects, "-o", str(target)]
            if sanitized:
                _run([*command, *mode])
            else:
                _link_portable(command)
            target.replace(library_path(isa, sanitized))

        for job in [pool.submit(compile_unit, isa, unit) for unit in units for isa in isas]:
            job.result()
        for job in [pool.submit(link, isa) for isa in isas]:
            job.result()


def _link_portable(command: list[str]) -> None:
    try:
        _run([*command, *_PORTABLE])
    except BuildError:  # some systems come without the C++ runtime's archive
        _run(command)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"the compiler failed: {shlex.join(command)}\n{done.stderr.strip()}")
    if done.stderr:
        print(done.stderr.strip(), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Without a compiler nothing is built and that is no error: the torch path serves."""
    parser = argparse.ArgumentParser(prog="python -m meshlm.kernels.native.build", description="Build the CPU kernels.")
    parser.add_argument(
        "--sanitize", action="store_true", help="with address and undefined-behaviour checks, beside the others"
    )
    parser.add_argument(
        "--isa", action="append", choices=tuple(ISAS), help="only this instruction set (may be repeated)"
    )
    options = parser.parse_args(arguments)
    try:
        paths = build(options.isa, sanitized=options.sanitize)
    except NoCompilerError as error:
        print(f"The native CPU kernels are not built: {error}. Models run in torch then, several times slower.")
        return 0
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print("Native CPU kernels: " + ", ".join(path.name for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
