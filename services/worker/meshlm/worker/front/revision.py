"""The name of a model's weights: equal files have equal revisions, and answers of different ones are never mixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

_DECIDING = (".gguf", ".safetensors", ".json", ".jinja", ".model")
_DIGITS = 16


def file_digest(path: Path) -> str:
    """16 hex digits of SHA-256 over the file, or over the names and contents of a folder's deciding files.

    Reads everything once: call it on a thread. Raises OSError.
    """
    if path.is_file():
        return _sha256(path)[:_DIGITS]
    files = sorted(file for file in path.iterdir() if file.suffix in _DECIDING and file.is_file())
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name}\0{_sha256(file)}\n".encode())
    return whole.hexdigest()[:_DIGITS]


def revision(digest: str, quantization: str) -> str:
    """Weights that are quantized while loading give other answers, so they have another revision."""
    return digest if quantization == "none" else f"{digest}-{quantization}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
