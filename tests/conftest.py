"""Fixtures that several parts share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from meshlm.mesh.model import model_path

# The same examples in every run, and no bound on their time: a change is not held up by what it did not touch, nor by a
# machine that is busy. `pytest --hypothesis-profile=search` looks for new ones, for whom it finds something.
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]  # fixtures here are made to be used again
settings.register_profile("gate", derandomize=True, deadline=None, suppress_health_check=SLOW)
settings.register_profile("search", parent=settings.get_profile("gate"), derandomize=False, print_blob=True)
settings.load_profile("gate")

# Tracebacks with all local variables, as structlog draws them where rich is there, take seconds each.
_plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback, colors=False)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _plain])

# Triton reads it when it is first imported, by whichever test that is. Asking torch would cost every run a second.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# OpenMP reads it when torch loads it: threads that spin for ever take a step's time a hundredfold on a busy machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model's GGUF file, or a skip with the way to get it."""
    path = Path(os.environ.get("MESHLM_TEST_MODEL") or model_path())
    if not path.is_file():
        pytest.skip(f"{path} is not there: `make model` fetches it, or set MESHLM_TEST_MODEL")
    return path
