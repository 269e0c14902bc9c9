"""`meshlm demo`: it fails where something that it shows did not happen."""

from __future__ import annotations

import asyncio
import io
import re
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from rich.console import Console

from meshlm.chassis.errors import MeshError, Reason
from meshlm.guard.config import PolicyConfig
from meshlm.mesh.client import AsyncMesh
from meshlm.mesh.demo import Demo, DemoFailed
from tests.mesh.fakes import KEY, ScriptedRouter

pytestmark = pytest.mark.usefixtures("own_machine")


class TestDemo:
    """It must fail where something did not happen; here, nearly nothing does."""

    @pytest.fixture
    async def demo(self, router: ScriptedRouter) -> AsyncIterator[Demo]:
        async with AsyncMesh(router.target, key=KEY) as client:
            yield Demo(client, router.target, "/nonexistent/spans.db", Console(file=io.StringIO()))

    async def test_a_second_answer_that_was_computed_again_fails_it(self, demo: Demo) -> None:
        first = await demo.answers()
        with pytest.raises(DemoFailed, match="did not come from the cache"):
            await demo.answers_again(first)

    async def test_an_answered_jailbreak_fails_it(self, demo: Demo) -> None:
        with pytest.raises(DemoFailed, match="was answered"):
            await demo.refuses()

    async def test_a_paraphrase_that_rules_refused_fails_it(self, demo: Demo, router: ScriptedRouter) -> None:
        router.refusal = MeshError(
            Reason.INJECTION_SUSPECTED, "an attack", metadata={"categories": "injection.override"}
        )
        with pytest.raises(DemoFailed, match=r"by injection\.override, not by the model's score"):
            await demo.refuses()

    async def test_a_refusal_for_another_reason_fails_it(self, demo: Demo, router: ScriptedRouter) -> None:
        router.refusal = MeshError(Reason.OVERLOADED, "busy")
        with pytest.raises(DemoFailed, match="OVERLOADED"):
            await demo.refuses()

    @pytest.mark.mesh
    @pytest.mark.model
    async def test_on_the_real_model_all_of_it_happens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MESHLM_CACHE")
        demo = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "meshlm.mesh.cli", "demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await demo.communicate()
        assert (demo.returncode, err) == (0, b"")
        assert "from the cache" in out.decode()
        assert re.search(r"refused: INJECTION_SUSPECTED, injection\.model \(", out.decode())
        told = re.search(r"no rule knows these words: the guard's model gave them ([\d.]+)", out.decode())
        assert told is not None
        assert float(told[1]) >= PolicyConfig().attack_block_score
