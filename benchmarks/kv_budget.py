"""What a budget on the KV cache costs: facts found again in a long text, and perplexity of its continuation.

A needle is a sentence with a number, at some depth of a text of passages; asked for at the end, greedily. A policy's
share is of the needles that the model finds with its whole cache. Perplexity is of the last tokens of a text, given all
before: these are the prompt, and the scored ones are computed as an answer is, behind it and under the budget. Budgets
are shares of the context; memory saved is 1 minus the budget: with `importance` once the prompt is computed.
"""

from __future__ import annotations

import asyncio
import math
import random
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from harness import Row, option_parser, report
from our_engine import OurEngine
from serve import THREADS

from meshlm.mesh.model import model_path
from meshlm.mesh.quantize import fetch_corpus
from meshlm.worker.config import WorkerConfig
from meshlm.worker.messages import KvBudget
from meshlm.worker.text.tokenizer import Tokenizer

POLICIES = ("window", "importance")
BUDGETS = (0.5, 0.4, 0.25)
CONTEXTS = (1024, 2048, 4096)
SCORED = 256  # tokens of a continuation
ANSWER = 12  # tokens, enough for the number
CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Accra", "Riga", "Perth")


@dataclass(frozen=True)
class Needle:
    prompt: list[int]
    answer: str


class Texts:
    """Prompts of exact lengths from one text; each call goes on behind what the last one took."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.encode(text[: 1 << 22])
        self._at = 0
        self._random = random.Random(0)

    def take(self, count: int) -> list[int]:
        if self._at + count > len(self._ids):
            self._at = 0
        self._at += count
        return self._ids[self._at - count : self._at]

    def needle(self, context: int, depth: float) -> Needle:
        """A fact at `depth` (0: the beginning) of `context` tokens, and the question behind them."""
        city, number = self._random.choice(CITIES), str(self._random.randrange(1000, 10_000))
        encode = self._tokenizer.encode
        fact = encode(f"\n\nThe secret number of {city} is {number}. Remember it.\n\n")
        question = encode(f"\n\nQuestion: What is the secret number of {city}?\nAnswer: The secret number of {city} is")
        filler = self.take(context - len(fact) - len(question))
        cut = round(depth * len(filler))
        return Needle([*filler[:cut], *fact, *filler[cut:], *question], number)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def budgets(context: int) -> Iterator[tuple[str, KvBudget]]:
    for share in BUDGETS:
        for policy in POLICIES:
            yield f"{policy} {share:.0%}", KvBudget(policy=policy, tokens=round(share * context))


async def found(engine: OurEngine, texts: Texts, needles: list[Needle], kv: KvBudget | None) -> list[bool]:
    """Which of the needles are in the answers."""
    results = []
    for needle in needles:
        request = msgspec.structs.replace(engine.request(needle.prompt, ANSWER), kv=kv)
        results.append(needle.answer in texts.decode(await engine.tokens(request)))
    return results


async def retrieval(engine: OurEngine, texts: Texts, context: int, count: int) -> list[Row]:
    """The share of needles found, at evenly spread depths; with budgets, of those that are found without one."""
    needles = [texts.needle(context, (index + 0.5) / count) for index in range(count)]
    whole = await found(engine, texts, needles, None)
    name = f"needles found, context {context}"
    rows = [Row(f"{name}, whole cache", "of all", sum(whole) / count, count, 0.0)]
    known = [needle for needle, right in zip(needles, whole, strict=True) if right]
    for label, kv in budgets(context) if known else ():
        share = sum(await found(engine, texts, known, kv)) / len(known)
        rows.append(Row(f"{name}, {label}", "of those", share, len(known), 0.0, "whole cache", 1.0, share))
    return rows


async def perplexity(engine: OurEngine, prompts: list[list[int]], kv: KvBudget | None) -> float:
    total = 0.0
    for prompt in prompts:
        read, written = prompt[:-SCORED], prompt[-SCORED:]
        request = msgspec.structs.replace(engine.request(read, 1), generated=written, kv=kv, score_from=len(read))
        total += sum(await engine.logprobs(request))
    return math.exp(-total / (SCORED * len(prompts)))


async def continuation(engine: OurEngine, texts: Texts, context: int, count: int) -> list[Row]:
    prompts = [texts.take(context) for _ in range(count)]
    whole = await perplexity(engine, prompts, None)
    name = f"perplexity, context {context}"
    rows = [Row(f"{name}, whole cache", "", whole, count, 0.0)]
    for label, kv in budgets(context):
        value = await perplexity(engine, prompts, kv)
        rows.append(Row(f"{name}, {label}", "", value, count, 0.0, "whole cache", whole, whole / value))
    return rows


async def measure(chosen: Namespace) -> list[Row]:
    path = chosen.model or model_path()
    texts = Texts(Tokenizer.load(path), fetch_corpus().read_text("utf-8"))
    engine = OurEngine(WorkerConfig(model_path=path, threads=THREADS))
    await engine.start()
    rows: list[Row] = []
    try:
        if not engine.facts.kv_budgets:
            raise SystemExit(f"the {engine.facts.engine} engine keeps no KV budgets: it needs the native kernels")
        for context in chosen.context or ((1024,) if chosen.quick else CONTEXTS):
            rows += await retrieval(engine, texts, context, 4 if chosen.quick else 20)
            rows += await continuation(engine, texts, context, 1 if chosen.quick else 4)
    finally:
        await engine.stop()
    return rows


def main() -> None:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--context", type=int, nargs="+", metavar="TOKENS", help=f"default: {CONTEXTS}")
    chosen = parser.parse_args()
    report("kv_budget", asyncio.run(measure(chosen)), chosen.json)


if __name__ == "__main__":
    main()
