"""What can be wrong with a model's files."""

from __future__ import annotations

from pathlib import Path


class ModelFileError(Exception):
    """A model cannot be read. The text is `path: reason`, fit for an operator's eyes."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason
