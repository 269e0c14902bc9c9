"""What models make of `question_sets.py`: each question put to a worker, and its answer judged.

    python benchmarks/model_answers.py --model FILE.gguf --out answers.csv

writes a line a question: its id, 1 where the model was right, and how sure it was. Of options, that with the most
probability as the answer's first token is what it says; sums are written, greedily.

    python benchmarks/model_answers.py --join small.csv large.csv --out benchmarks/model_answers.csv

puts the questions that both answered into the file that `model_routing.py` learns from.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from question_sets import Question, questions

from meshlm.chassis.channels import open_channel
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2, worker_pb2_grpc

AT_ONCE = 4
SUM_TOKENS = 8


@asynccontextmanager
async def worker(model: Path, *, threads: int | None = None) -> AsyncIterator[Any]:
    """A stub of a worker of its own that serves this file."""
    with TemporaryDirectory(prefix="meshlm-") as folder:
        environment = {
            **os.environ,
            "MESHLM__WORKER__MODEL_PATH": str(model),
            "MESHLM__WORKER__SERVER__LISTEN": f"unix:{folder}/w",
            "MESHLM__WORKER__SERVER__ADMIN_LISTEN": "",
            "MESHLM__WORKER__HANG_SECONDS": "600",  # a step of a large model on a busy machine is long
            "MESHLM__TELEMETRY__LOG_LEVEL": "warning",
            **({"MESHLM__WORKER__THREADS": str(threads)} if threads else {}),
        }
        process = subprocess.Popen([sys.executable, "-m", "meshlm.worker.main"], env=environment)  # noqa: ASYNC220
        channel = open_channel(f"unix:{folder}/w")
        stub: Any = worker_pb2_grpc.WorkerServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            load = stub.WatchLoad(worker_pb2.WatchLoadRequest(watcher="benchmark"), wait_for_ready=True)
            while not (await load.read()).ready:
                pass
            load.cancel()
            yield stub
        finally:
            await channel.close()
            process.terminate()
            process.wait(60)


def input_of(question: Question) -> pb.Input:
    return pb.Input(chat=pb.Chat(messages=[pb.Message(role="user", content=question.text)]))


async def answer(stub: Any, question: Question) -> tuple[bool, float]:
    """Whether the model behind `stub` is right, and how sure it is: the log-probability of its option among all tokens,
    or the mean over those of the number."""
    if question.options:
        chunks = [chunk async for chunk in generated(stub, question, max_tokens=1, logprobs=20)]
        top = next(position.top for chunk in chunks for position in chunk.logprobs)
        likely = {token.text.strip(): token.logprob for token in reversed(top)}
        named = [option for option in question.options if option in likely]
        if not named:
            return False, min(likely.values())
        best = max(named, key=likely.__getitem__)
        return best == question.answer, likely[best]
    chunks = [chunk async for chunk in generated(stub, question, max_tokens=SUM_TOKENS, logprobs=0)]
    numbers = re.findall(r"-?\d+(?:\.\d+)?", "".join(chunk.text for chunk in chunks).replace(",", ""))
    logprobs = [position.chosen.logprob for chunk in chunks for position in chunk.logprobs]
    return bool(numbers) and float(numbers[-1]) == float(question.answer), sum(logprobs) / len(logprobs)


async def generated(stub: Any, question: Question, **sampling: Any) -> AsyncIterator[pb.Chunk]:
    """The greedy answer."""
    generation = pb.Generation(input=input_of(question), sampling=pb.Sampling(temperature=0.0, **sampling))
    request = worker_pb2.RunGenerationRequest(request_id=question.id, generation=generation, tenant="benchmark")
    async for message in stub.RunGeneration(request):
        yield message.chunk


def judged(out: Path) -> set[str]:
    """Questions of an earlier run; makes the file where there is none."""
    if not out.exists():
        out.write_text("id,right,sure\n")
    with out.open() as file:
        return {row["id"] for row in csv.DictReader(file)}


async def judge(model: Path, asked: list[Question], out: Path, threads: int | None) -> None:
    """Appends to `out` what is not in it yet, so that a run that was ended goes on."""
    known = judged(out)
    waiting = [question for question in asked if question.id not in known]
    places = asyncio.Semaphore(AT_ONCE)
    async with worker(model, threads=threads) as stub:
        with out.open("a", buffering=1) as file:

            async def one(question: Question) -> None:
                async with places:
                    right, sure = await answer(stub, question)
                    file.write(f"{question.id},{int(right)},{sure:.4f}\n")

            async with asyncio.TaskGroup() as group:  # ends with the first failure
                for question in waiting:
                    group.create_task(one(question))


def join(small: Path, large: Path, out: Path) -> None:
    """One line for each question in both files."""
    with small.open() as one, large.open() as other:
        first = {row["id"]: row for row in csv.DictReader(one)}
        second = {row["id"]: row for row in csv.DictReader(other)}
    lines = [
        f"{name},{first[name]['right']},{second[name]['right']},{first[name]['sure']}"
        for name in sorted(first.keys() & second.keys())
    ]
    out.write_text("\n".join(["id,small,large,small_sure", *lines]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--model", type=Path, metavar="FILE", help="ask this model")
    wanted.add_argument(
        "--join", type=Path, nargs=2, metavar="CSV", help="the small model's answers and the large one's"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--most", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--threads", type=int, metavar="N")
    arguments = parser.parse_args()
    if arguments.join:
        join(*arguments.join, arguments.out)
        return
    asyncio.run(judge(arguments.model, questions()[: arguments.most], arguments.out, arguments.threads))


if __name__ == "__main__":
    main()
