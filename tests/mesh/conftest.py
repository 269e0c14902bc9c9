"""An in-process router with scripted answers, and a machine on which nobody configured anything."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.mesh.fakes import ScriptedRouter


@pytest.fixture
async def router(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedRouter]:
    scripted = ScriptedRouter(f"unix:{tmp_path_factory.mktemp('r')}/s")
    await scripted.start()
    yield scripted
    await scripted.stop()


@pytest.fixture
def own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration, state or cache of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("MESHLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("MESHLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "500")
