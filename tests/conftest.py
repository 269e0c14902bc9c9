"""Fixtures that several parts share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, or a skip with the way to get it."""
    found = os.environ.get("MESHLM_TEST_MODEL") or Path.home() / ".cache" / "meshlm" / "models" / MODEL
    path = Path(found)
    if not path.is_file():
        pytest.skip(f"{path} is not there: `make model` fetches it, or set MESHLM_TEST_MODEL")
    return path
