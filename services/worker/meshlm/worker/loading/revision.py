"""A name for the exact weights of a model, so that answers of two versions are never mixed up. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.json_file import read_json

_CHUNK = 1 << 20  # bytes
_INDEX = "model.safetensors.index.json"
_BESIDE_WEIGHTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", _INDEX)


def model_revision(path: Path, cache: Path) -> str:
    """64 hexadecimal digits: the SHA-256 of a GGUF file, or over the names and digests of a folder's files.

    Digests are kept in `cache` (made if absent, done without where it cannot be written) by path, size and time of
    change, since hashing reads every byte.
    Raises ModelFileError: a file is missing or cannot be read.
    """
    if not path.is_dir():
        return _cached_digest(path, cache)
    digest = hashlib.sha256()
    for file in _folder_files(path):
        digest.update(f"{file.name}\0{_cached_digest(file, cache)}\n".encode())
    return digest.hexdigest()


def _folder_files(folder: Path) -> list[Path]:
    """What can change an answer, in a fixed order: settings, tokenizer, template, and the weights."""
    beside = [folder / name for name in (*_BESIDE_WEIGHTS, "chat_template.jinja") if (folder / name).is_file()]
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise ModelFileError(folder / _INDEX, "no weight_map in it")
        return beside + [folder / name for name in sorted(set(shards.values()))]
    return [*beside, folder / "model.safetensors"]


def _cached_digest(path: Path, cache: Path) -> str:
    try:
        stat = path.stat()
        key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        entry = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.sha256"
        known = _kept(entry)
        digest = known or _digest(path)
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error)) from None
    if not known:
        _keep(entry, digest)
    return digest


def _kept(entry: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        if len(known := entry.read_text("ascii").strip()) == 64:
            return known
    return None


def _keep(entry: Path, digest: str) -> None:
    """Written aside and renamed: two workers may start at the same time. Where it cannot be written, a read-only file
    system for one, the next start reads the file again."""
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent) as aside:
            (Path(aside) / entry.name).write_text(digest, "ascii")
            (Path(aside) / entry.name).replace(entry)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
