"""Policies that change while the guard serves."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from meshlm.chassis.config import Source
from meshlm.guard.policy import BLOCK, Policies
from meshlm.guard.reloading import Reloading
from meshlm.guard.scores import read_config
from meshlm.guard.watches import Redactor

STRICT = '[guard]\nreload_seconds = 0.01\n[guard.policies.default]\nactions = { pii = "block" }\n'
LAX = '[guard]\nreload_seconds = 0.01\n[guard.policies.default]\nactions = { pii = "allow" }\n[guard.policies.more]\n'
BROKEN = [
    "[guard.policies.default]\nactions = { pii = 'perhaps' }\n",
    "[guard.policies.default]\nanswer_flag_score = 7.0\n",
    "[guard.policies.more]\n[guard.policies.default]\nscripts = ['Klingon']\n",
    "not toml at all [",
]
MAIL = "jo.doe@example.org "


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.toml"
    path.write_text(STRICT)
    return path


def write(file: Path, text: str) -> None:
    """At once: whoever reads it meanwhile finds one or the other."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def remove(file: Path) -> None:
    file.unlink()


def policies_of(file: Path) -> tuple[Policies, Reloading]:
    config = read_config(Source.read(file, {}))
    policies = Policies(config.policies)
    return policies, Reloading(file, config, policies, lambda path: Source.read(path, {}))


async def stopped(policies: Policies) -> bool:
    check = policies.get("").output_check()
    await check.feed(MAIL, last=True)
    return policies.get("").judge_output(check).action == BLOCK


async def test_a_file_that_changed_counts_from_the_next_request_on_under_another_version(file: Path) -> None:
    policies, reloading = policies_of(file)
    before = policies.get("").version
    begun = policies.get("")
    reloading.start()
    assert await stopped(policies)
    write(file, LAX)
    async with asyncio.timeout(60):
        while policies.get("").version == before:
            await asyncio.sleep(0.01)
    assert not await stopped(policies)
    assert policies.get("more")
    check = begun.output_check()  # of an answer that began before
    await check.feed(MAIL, last=True)
    assert begun.judge_output(check).action == BLOCK
    await reloading.stop()


@pytest.mark.parametrize("broken", BROKEN)
async def test_a_broken_file_changes_nothing_and_says_so(file: Path, broken: str) -> None:
    policies, reloading = policies_of(file)
    before = policies.get("").version
    write(file, broken)
    with capture_logs() as lines:
        assert not reloading.reload()
    assert [line["log_level"] for line in lines] == ["error"]
    assert policies.get("").version == before
    assert await stopped(policies)
    remove(file)
    assert not reloading.reload()
    write(file, LAX)
    assert reloading.reload()
    assert not await stopped(policies)


async def test_a_signal_asks_at_once(file: Path) -> None:
    write(file, STRICT.replace("0.01", "0"))  # not looked at by itself
    policies, reloading = policies_of(file)
    before = policies.get("").version
    reloading.start()
    write(file, LAX)
    await asyncio.sleep(0.05)
    assert policies.get("").version == before
    os.kill(os.getpid(), signal.SIGHUP)
    async with asyncio.timeout(60):
        while policies.get("").version == before:
            await asyncio.sleep(0.01)
    await reloading.stop()


def test_a_policy_that_begins_to_redact_has_a_redactor(file: Path) -> None:
    policies, reloading = policies_of(file)
    write(file, STRICT.replace('"block"', '"redact"'))
    assert reloading.reload()
    assert any(isinstance(watch, Redactor) for watch in policies.get("").output_check()._holding)
