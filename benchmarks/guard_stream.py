"""What the output guard costs a stream: time to the first text, and throughput.

A worker of a fixed rate (words of four bytes, a token each) is read through the router's window, with a guard process
of its own behind a unix socket: rules alone, and the embedded model, `strict` and `fast`. The first text of `strict`
may be late by the tokens of one window (16) and one pass of the guard, which is measured beside: the time from a
text's being sent to the guard until its word comes. Throughput is of a worker that never waits, and of one alone.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
from harness import Row, against, options, report

from meshlm.chassis.channels import open_channel
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.router.guarding.guards import Guards
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import guard_pb2, guard_pb2_grpc, worker_pb2

WORDS = ["the", "sun", "may", "set", "and", "one", "boy", "ran", "for", "the", "big", "red", "bus", "but", "not", "yet"]
WINDOW = 16  # tokens
RATE = 50.0  # tokens a second
POLICIES = """
[guard]
model = "embedded"
[guard.server]
listen = "{listen}"
[guard.policies.rules]
output_detectors = ["secrets", "pii"]
[guard.policies.strict]
[guard.policies.fast]
answer_release = "fast"
"""


@contextmanager
def run_guard() -> Iterator[str]:
    with TemporaryDirectory(prefix="meshlm-") as folder:
        listen = f"unix:{folder}/g"
        file = Path(folder) / "mesh.toml"
        file.write_text(POLICIES.format(listen=listen))
        command = [sys.executable, "-c", f"import os; os.environ['MESHLM_CONFIG'] = {str(file)!r}\n" + _MAIN]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not Path(f"{folder}/g").exists():
                if process.poll() is not None:
                    raise SystemExit("the guard did not start")
                time.sleep(0.05)
            yield listen
        finally:
            process.terminate()
            process.wait()


_MAIN = "from meshlm.chassis import server; from meshlm.guard.main import build; server.main('guard', build)"


async def worker(tokens: int, rate: float | None) -> AsyncIterator[worker_pb2.RunGenerationResponse]:
    """Its messages, a token each; `rate` a second, or as fast as they are read."""
    begun = time.perf_counter()
    for number in range(tokens):
        if rate is not None:
            await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        last = number + 1 == tokens
        chunk = pb.Chunk(token_offset=number, token_count=1, text=WORDS[number % len(WORDS)] + " ")
        chunk.finish_reason = pb.FINISH_REASON_LENGTH if last else pb.FINISH_REASON_UNSPECIFIED
        yield worker_pb2.RunGenerationResponse(chunk=chunk)


async def stream(guards: Guards, policy: str, tokens: int, rate: float | None) -> tuple[float, float]:
    """Seconds to the first text, and to the end."""
    key = KeyConfig(id="k", secret_hash="0" * 64, tenant="t", guard_policy=policy)
    window = guards.open_output("bench", key, pb.Input(prompt="Tell me a story."))
    await window.open()
    begun, first = time.perf_counter(), 0.0
    async for event in window.through(worker(tokens, rate)):
        if isinstance(event, pb.Chunk) and event.text and not first:
            first = time.perf_counter() - begun
    total = time.perf_counter() - begun
    await window.finish()
    window.close()
    return first, total


async def passes(target: str, policy: str, runs: int) -> list[float]:
    """Seconds from a whole first window's being sent until the guard's word on it."""
    async with open_channel(target) as channel:
        stub = guard_pb2_grpc.GuardServiceStub(channel)
        text = guard_pb2.OutputText(text=(" ".join(WORDS) + " ")[: WINDOW * 4])
        seconds = []
        for _ in range(runs):
            call = stub.CheckOutput()  # type: ignore[call-arg]
            await call.write(guard_pb2.CheckOutputRequest(start=guard_pb2.OutputCheckStart(policy=policy)))  # type: ignore[attr-defined]
            begun = time.perf_counter()
            await call.write(guard_pb2.CheckOutputRequest(text=text))  # type: ignore[attr-defined]
            while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                if policy == "rules" or response.judged_chars >= WINDOW * 4:
                    break
            seconds.append(time.perf_counter() - begun)
            call.cancel()  # type: ignore[attr-defined]
        return seconds


async def compare(target: str, *, runs: int, tokens: int) -> list[Row]:
    without, behind = Guards(RouterConfig(guard="")), Guards(RouterConfig(guard=target))
    for policy in ("rules", "strict", "fast"):
        await stream(behind, policy, 64, None)
    rows = []
    first: dict[str, list[float]] = {"": [], "rules": [], "strict": [], "fast": []}
    for _ in range(runs):  # in turn, so that a busy machine is busy for all
        for policy, seen in first.items():
            seen.append((await stream(behind if policy else without, policy, 24, RATE))[0] * 1_000)
    judged = [seconds * 1_000 for seconds in await passes(target, "strict", runs)]
    rows.append(Row("one pass of the guard, first window, median", "ms", statistics.median(judged), runs, 0.0))
    bound = WINDOW / RATE * 1_000 + statistics.median(judged)
    for policy in ("rules", "strict", "fast"):
        added = statistics.median(first[policy]) - statistics.median(first[""])
        limit, goal = (bound, f"at most {bound:.1f}") if policy == "strict" else (None, "")
        rows.append(Row(f"added to the first text, {policy}, p50", "ms", added, runs, 0.0, limit=limit, goal=goal))
    rates: dict[str, list[float]] = {"": [], "rules": [], "strict": [], "fast": []}
    for _ in range(max(3, runs // 4)):
        for policy, seen in rates.items():
            _, seconds = await stream(behind if policy else without, policy, tokens, None)
            seen.append(tokens / seconds)
    rows += [
        against(f"one stream, {policy}", "tokens/s", rates[policy], "no guard", rates[""])
        for policy in ("rules", "strict", "fast")
    ]
    many: dict[str, list[float]] = {"rules": [], "strict": [], "fast": []}
    for _ in range(3):
        for policy, seen in many.items():
            begun = time.perf_counter()
            await asyncio.gather(*(stream(behind, policy, tokens // 4, None) for _ in range(16)))
            seen.append(16 * (tokens // 4) / (time.perf_counter() - begun))
    rows += [
        against(f"16 streams at once, {policy}", "tokens/s", many[policy], "rules alone", many["rules"])
        for policy in ("strict", "fast")
    ]
    await behind.stop()
    return rows


def main() -> None:
    chosen = options(__doc__ or "")
    runs, tokens = (8, 400) if chosen.quick else (40, 2_000)
    with run_guard() as target:
        rows = asyncio.run(compare(target, runs=runs, tokens=tokens))
    report("guard_stream", rows, chosen.json)


if __name__ == "__main__":
    main()
