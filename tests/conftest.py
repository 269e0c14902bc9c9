"""Fixtures that several parts share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshlm.mesh.model import model_path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, or a skip with the way to get it."""
    path = Path(os.environ.get("MESHLM_TEST_MODEL") or model_path())
    if not path.is_file():
        pytest.skip(f"{path} is not there: `make model` fetches it, or set MESHLM_TEST_MODEL")
    return path
