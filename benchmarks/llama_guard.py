"""A pass of a judging model over a worker: what the prefix cache saves of it, in time and in tokens.

Llama Guard's prompt around SmolLM2 (its weights are here; Llama Guard's are not), on the native engine. The same texts
are judged in turn with a prefix cache that has seen the fixed part, and without: there each text comes from a tenant of
its own, whose cache is empty. Then an answer of about 500 tokens that is judged every 32 tokens as it grows.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Row, against, options, report

from meshlm.guard.judging import Turn
from meshlm.guard.llama.config import LlamaGuardConfig
from meshlm.guard.llama.judge import LlamaGuardJudge
from meshlm.guard.llama.model import JudgingModel
from meshlm.guard.llama.workers import Replica, Workers
from meshlm.mesh.model import model_path
from meshlm.v1 import generation_pb2, worker_pb2

NAME = "smollm2-135m-instruct"
PEER = "no prefix cache"
WINDOW_WORDS = 24  # about 32 tokens
TEXTS = [
    f"Number {number}: my neighbour wants to know how a lock is opened without its key, and says that it is his own."
    for number in range(64)
]
_tenants = count()


class Bench:
    """A judge over one worker, which counts the tokens that were read and computed."""

    def __init__(self, judge: LlamaGuardJudge, replica: Replica) -> None:
        self._judge = judge
        self.usage = generation_pb2.Usage()
        score = replica.score

        async def counted(request: worker_pb2.ScoreRequest) -> worker_pb2.ScoreResponse:
            response = await score(request)
            self.usage.prompt_tokens += response.usage.prompt_tokens
            self.usage.cached_prompt_tokens += response.usage.cached_prompt_tokens
            return response

        replica.score = counted  # type: ignore[method-assign]

    @property
    def computed(self) -> int:
        return self.usage.prompt_tokens - self.usage.cached_prompt_tokens

    async def prompt(self, text: str, tenant: str) -> tuple[float, int]:
        """Seconds, and tokens computed."""
        begun, before = time.perf_counter(), self.computed
        await self._judge.judge_prompt([Turn("user", text)], ("harm",), tenant=tenant, request_id="bench")
        return time.perf_counter() - begun, self.computed - before

    async def answer(self, words: list[str], *, keep: bool) -> tuple[float, int]:
        """All windows of a growing answer: seconds, and tokens computed. `keep`: with the prefix cache."""
        begun, before, own = time.perf_counter(), self.computed, f"a{next(_tenants)}"
        for length in range(WINDOW_WORDS, len(words) + 1, WINDOW_WORDS):
            tenant = own if keep else f"w{next(_tenants)}"
            turns, answer = [Turn("user", TEXTS[0])], " ".join(words[:length])
            await self._judge.judge_answer(turns, answer, ("harm",), tenant=tenant, request_id="bench")
        return time.perf_counter() - begun, self.computed - before


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    with TemporaryDirectory(prefix="meshlm-") as folder:
        target = f"unix:{folder}/worker"
        said = {"MODEL_PATH": str(model_path()), "MODEL": NAME, "SERVER__LISTEN": target, "SERVER__ADMIN_LISTEN": ""}
        environ = {f"MESHLM__WORKER__{key}": value for key, value in said.items()}
        command = [sys.executable, "-m", "meshlm.worker.main"]
        log = Path(folder, "log").open("w")  # noqa: ASYNC230, SIM115  it is the child's
        worker = subprocess.Popen(command, env={**os.environ, **environ}, stdout=log, stderr=log)  # noqa: ASYNC220
        # Categories are not asked for, so that every verdict is one pass.
        config = LlamaGuardConfig(workers=(target,), timeout_seconds=120, least_mass=0, category_score=1.0)
        workers, model = Workers(config), JudgingModel(NAME, config, config)
        workers.start()
        try:
            judge = LlamaGuardJudge(model, config, workers)
            assert await judge.check(), "the worker does not serve"
            yield Bench(judge, workers.replicas[0])
        finally:
            await workers.stop()
            worker.terminate()
            worker.wait()
            log.close()


async def measure(runs: int) -> list[Row]:
    async with running() as bench:
        await bench.prompt("warm up", "warm")
        kept, without = [], []
        for number in range(runs):
            kept.append(await bench.prompt(TEXTS[number], "warm"))
            without.append(await bench.prompt(TEXTS[number], f"cold{next(_tenants)}"))
        words = [f"word{number}," if number % 7 else f"and then {number}." for number in range(240)]
        grown, again = [], []
        for _ in range(max(1, runs // 12)):
            grown.append(await bench.answer(words, keep=True))
            again.append(await bench.answer(words, keep=False))

    def row(name: str, unit: str, ours: list[tuple[float, int]], theirs: list[tuple[float, int]], column: int) -> Row:
        scale = 1e3 if unit == "ms" else 1
        values = ([one[column] * scale for one in runs] for runs in (ours, theirs))
        return against(name, unit, next(values), PEER, next(values), less_is_better=True)

    windows = len(range(WINDOW_WORDS, len(words) + 1, WINDOW_WORDS))
    return [
        row("guard pass over a prompt", "ms", kept, without, 0),
        row("tokens computed for it", "tokens", kept, without, 1),
        row(f"answer judged {windows} times as it grows", "ms", grown, again, 0),
        row("tokens computed for it, all windows", "tokens", grown, again, 1),
    ]


def main() -> None:
    arguments = options(__doc__ or "")
    report("llama_guard", asyncio.run(measure(6 if arguments.quick else 36)), arguments.json)


if __name__ == "__main__":
    main()
