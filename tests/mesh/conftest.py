"""An in-process router with scripted answers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.mesh.fakes import ScriptedRouter


@pytest.fixture
async def router(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedRouter]:
    scripted = ScriptedRouter(f"unix:{tmp_path_factory.mktemp('r')}/s")
    await scripted.start()
    yield scripted
    await scripted.stop()
