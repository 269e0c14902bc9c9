"""What a process writes to its log, seen from outside."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import asyncio, logging
import structlog
from meshlm.chassis import logs
from meshlm.chassis.config import TelemetryConfig

logs.configure("test", TelemetryConfig())
logging.getLogger("library").warning("took %s of %d", "the secret prompt", 3)

async def forgotten():
    raise RuntimeError("the secret prompt")

async def main():
    task = asyncio.ensure_future(forgotten())
    await asyncio.sleep(0)
    del task

asyncio.run(main())
try:
    raise ValueError("the secret prompt")
except ValueError:
    structlog.get_logger().exception("failed")
"""


def test_no_text_of_an_exception_nor_of_a_librarys_arguments_reaches_the_log() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["event"] for line in lines] == [
        "took %s of %d",
        "Task exception was never retrieved",
        "failed",
    ]
    assert [line.get("library") for line in lines] == ["library", "asyncio", None]
    assert [line.get("error") for line in lines] == [None, "builtins.RuntimeError", "builtins.ValueError"]
    assert "secret" not in result.stderr
