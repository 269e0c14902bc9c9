"""Fixtures that several parts share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshlm.mesh.model import model_path

# Triton reads it when it is first imported, by whichever test that is. Asking torch would cost every run a second.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, or a skip with the way to get it."""
    path = Path(os.environ.get("MESHLM_TEST_MODEL") or model_path())
    if not path.is_file():
        pytest.skip(f"{path} is not there: `make model` fetches it, or set MESHLM_TEST_MODEL")
    return path
