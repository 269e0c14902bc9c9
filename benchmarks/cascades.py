"""A cascade of two models: right answers bought for each share of requests that the large one takes over.

    python benchmarks/cascades.py --ask FILE.gguf --out answers.jsonl          # each model, once
    python benchmarks/cascades.py --join smollm2.jsonl qwen1.5.jsonl qwen0.5.jsonl
    python benchmarks/cascades.py [--train] [--embed FILE.gguf]

The last reads `open_answers.csv`: which of `open_questions.py` each model was right on, and the log-probabilities of
the small ones' tokens. It draws the quality-cost curve of the doubt that the router goes by (`confidence.py`), among
requests that look alike, which learned no answer to anything; beside chance, other measures of doubt, the prompt's
look, and an oracle that knows both answers. `--embed` has the small model read each question, for what its hidden
states and its surprise at the prompt tell. `--train` writes how much doubt is usual: the router's first threshold.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Row, option_parser, report
from model_answers import worker
from model_routing import Array, apgr, at_share, best_penalty, curve, interval, ridge
from open_questions import Open, questions

from meshlm.router.routing.complexity import features, load
from meshlm.router.routing.confidence import doubt_of
from meshlm.router.routing.quantiles import Similar, quantiles_of
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

ANSWERS = ROOT / "benchmarks/open_answers.csv"
DOUBTS = ROOT / "services/router/meshlm/router/routing/confidence.json"
AT_ONCE = 8
FEW = 100
SHARES = np.linspace(0.05, 0.95, 37)
SMALL, LARGE = ("smollm2", "qwen0.5"), "qwen1.5"
# Measures of doubt, of the log-probabilities of an answer's tokens; the first is the router's.
MEASURES: dict[str, Callable[[Sequence[float]], float]] = {
    "three least likely tokens": lambda logprobs: doubt_of(logprobs) or 0.0,
    "least likely token": lambda logprobs: -min(logprobs),
    "mean of all tokens": lambda logprobs: -sum(logprobs) / len(logprobs),
    "sum of all tokens": lambda logprobs: -sum(logprobs),
    "lowest tenth (quantile)": lambda logprobs: -float(np.quantile(logprobs, 0.1)),
    "first token": lambda logprobs: -logprobs[0],
    "first four tokens, three least": lambda logprobs: doubt_of(logprobs[:4]) or 0.0,
}


class Pair:
    """Questions that a small and the large model answered. `small`, `large`: 1 where it was right."""

    def __init__(self, name: str, rows: Sequence[dict[str, str]], asked: dict[str, Open], which: str) -> None:
        """`which`: `common` questions, `other` ones, or `all`."""
        wanted = {id_ for id_, one in asked.items() if which in ("all", "common" if one.common else "other")}
        answered = [row for row in rows if row[name] and row[LARGE] and row["id"] in wanted]
        self.name = f"{name}, {which}"
        self.questions = [asked[row["id"]] for row in answered]
        self.small, self.large = (np.array([float(row[model]) for row in answered]) for model in (name, LARGE))
        self.gain = self.large - self.small
        self.logprobs = [[float(word) for word in row[f"{name}_logprobs"].split()] for row in answered]
        self.source = np.array([question.source for question in self.questions])
        self.inputs = [input_of(question) for question in self.questions]

    def doubt(self, measure: Callable[[Sequence[float]], float]) -> Array:
        return np.array([measure(logprobs) if logprobs else 0.0 for logprobs in self.logprobs])

    def among_similar(self, doubt: Array, looks: Array) -> Array:
        """Each question's doubt by the rank that it has among those that look like it, as the router ranks it: which of
        SHARES the small model must be left for it to go to the large one. All others were seen before; of too few the
        router would not know what is usual, and the doubt is as it is."""
        if len(doubt) <= FEW:
            return doubt
        score = np.zeros(len(doubt))
        for number in range(len(doubt)):
            similar = Similar(looks.shape[1])
            for other in np.flatnonzero(np.arange(len(doubt)) != number):
                similar.note(looks[other], doubt[other])
            score[number] = sum(doubt[number] > (similar.threshold(looks[number], share) or 0.0) for share in SHARES)
        return score

    def unseen(self, x: Array) -> Array:
        """Each question's predicted gain, by what was learned from the other kinds."""
        score = np.zeros(len(self.gain))
        for source in set(self.source.tolist()):
            rows = self.source != source
            weights, bias = ridge(x[rows], self.gain[rows], best_penalty(x[rows], self.gain[rows]))
            score[~rows] = x[~rows] @ weights + bias
        return score

    def line(self, score: Array) -> Array:
        return curve(score, self.small, self.gain)

    def interval(self, score: Array, value: Callable[[Array], float]) -> list[float]:
        """95%, by resampling the questions."""
        return interval(score, self.small, self.gain, value)


def input_of(question: Open) -> pb.Input:
    return pb.Input(chat=pb.Chat(messages=[pb.Message(role="user", content=question.text)]))


def share_for(line: Array, part: float) -> float:
    """The least share of requests at the large model with which `part` of the gap between the two is closed."""
    reached = np.flatnonzero(line >= line[0] + part * (line[-1] - line[0]))
    return float(reached[0]) / (len(line) - 1)


def auc(score: Array, right: Array) -> float:
    """How often a right answer has less doubt than a wrong one."""
    wrong = score[right == 0][:, None]
    sure = score[right == 1][None]
    return float((wrong > sure).mean() + (wrong == sure).mean() / 2)


def evaluate(pair: Pair) -> tuple[list[Row], dict[str, Any]]:
    count = len(pair.gain)

    def row(name: str, value: float, peer: str, other: float) -> Row:
        return Row(f"{pair.name}: {name}", "share", value, count, 0.0, peer, other, value / other if other else 0.0)

    plain = pair.doubt(next(iter(MEASURES.values())))
    looks = np.array([features(source) for source in pair.inputs])
    doubt = pair.among_similar(plain, looks)
    ours, chance = pair.line(doubt), "chance"
    rows = [
        row("right_small", ours[0], "large model", ours[-1]),
        row("apgr", apgr(ours), chance, 0.5),
        row("apgr_one_threshold_for_all", apgr(pair.line(plain)), chance, 0.5),
        row("apgr_oracle", apgr(pair.line(pair.gain)), chance, 0.5),
        row("right_at_80_small", at_share(ours, 0.2), chance, 0.8 * ours[0] + 0.2 * ours[-1]),
        row("right_at_50_small", at_share(ours, 0.5), chance, (ours[0] + ours[-1]) / 2),
        row("large_share_for_50_of_the_gap", share_for(ours, 0.5), chance, 0.5),
        row("large_share_for_80_of_the_gap", share_for(ours, 0.8), chance, 0.8),
    ]
    return rows, {
        "small_is_right_auc": round(auc(doubt, pair.small), 3),
        "intervals_95": {
            "apgr": pair.interval(doubt, apgr),
            "apgr_one_threshold_for_all": pair.interval(plain, apgr),
            "over_chance_at_80_small": pair.interval(
                doubt, lambda line: at_share(line, 0.2) - (0.8 * line[0] + 0.2 * line[-1])
            ),
            "over_chance_at_50_small": pair.interval(
                doubt, lambda line: at_share(line, 0.5) - (line[0] + line[-1]) / 2
            ),
            "large_share_for_50_of_the_gap": pair.interval(doubt, lambda line: share_for(line, 0.5)),
            "large_share_for_80_of_the_gap": pair.interval(doubt, lambda line: share_for(line, 0.8)),
        },
        "measures": {
            name: {
                "one_threshold": _figures(pair, pair.doubt(measure)),
                "similar": _figures(pair, pair.among_similar(pair.doubt(measure), looks)),
            }
            for name, measure in MEASURES.items()
        },
        "sources": {source: _by_source(pair, doubt, source) for source in sorted(set(pair.source.tolist()))},
    }


def by_the_prompt(pair: Pair, read: dict[str, Array] | None) -> dict[str, Any]:
    """What was known before anything was answered: the router's scorer, its features learned anew from the other
    kinds of questions, and, where the small model `read` the prompts, what it made of them."""
    look = np.array([features(source) for source in pair.inputs])
    scorer = load()
    found = {
        "look_as_shipped": _figures(pair, np.array([scorer.score(source) for source in pair.inputs])),
        "look_unseen_kinds": _figures(pair, pair.unseen(look)),
    }
    for name, x in (read or {}).items():
        found[name] = _figures(pair, x[:, 0] if x.shape[1] == 1 else pair.unseen(x))
    return found


def _figures(pair: Pair, score: Array) -> dict[str, Any]:
    return {
        "apgr": round(apgr(pair.line(score)), 3),
        "interval": pair.interval(score, apgr),
        "small_is_right_auc": round(auc(score, pair.small), 3),
    }


def _by_source(pair: Pair, doubt: Array, source: str) -> dict[str, Any]:
    rows = pair.source == source
    small, large = pair.small[rows], pair.large[rows]
    found: dict[str, Any] = {"questions": int(rows.sum()), "small": float(small.mean()), "large": float(large.mean())}
    found["to_large_at_50_small"] = float((doubt[rows] > np.quantile(doubt, 0.5)).mean())
    if 0 < small.sum() < len(small):
        found["small_is_right_auc"] = auc(doubt[rows], small)
    if large.mean() - small.mean() > 0.1:
        found["apgr"] = apgr(curve(doubt[rows], small, large - small))
    return {name: round(value, 3) for name, value in found.items()}


async def read_by(model: Path, pair: Pair) -> dict[str, Array]:
    """The small model's mean and last hidden state of each prompt, and its mean surprise, nats a token."""
    vectors: dict[str, list[Any]] = {"mean_hidden_state": [], "last_hidden_state": [], "surprise_at_the_prompt": []}
    poolings = {"mean_hidden_state": worker_pb2.POOLING_MEAN, "last_hidden_state": worker_pb2.POOLING_LAST}
    async with worker(model) as stub:
        for question, source in zip(pair.questions, pair.inputs, strict=True):
            named = {"request_id": question.id, "tenant": "benchmark"}
            for name, pooling in poolings.items():
                embedded = await stub.Embed(worker_pb2.EmbedRequest(inputs=[source], pooling=pooling, **named))
                vectors[name].append(list(embedded.embeddings[0].vector))
            scored = await stub.Score(worker_pb2.ScoreRequest(input=pb.Input(prompt=question.text), **named))
            vectors["surprise_at_the_prompt"].append([-float(np.mean(scored.scored[0].logprobs))])
    return {name: np.array(rows) for name, rows in vectors.items()}


def answered(out: Path) -> set[str]:
    """Questions of an earlier run."""
    return {json.loads(line)["id"] for line in out.read_text().splitlines()} if out.exists() else set()


async def ask(model: Path, out: Path, most: int | None, threads: int | None) -> None:
    """Appends to `out` what is not in it yet, so that a run that was ended goes on."""
    known = answered(out)
    places = asyncio.Semaphore(AT_ONCE)
    async with worker(model, threads=threads) as stub:
        with out.open("a", buffering=1) as file:

            async def one(question: Open) -> None:
                async with places:
                    file.write(json.dumps(await _answer(stub, question)) + "\n")

            async with asyncio.TaskGroup() as group:
                for question in questions()[:most]:
                    if question.id not in known:
                        group.create_task(one(question))


async def _answer(stub: Any, question: Open) -> dict[str, Any]:
    sampling = pb.Sampling(temperature=0.0, max_tokens=question.most_tokens, logprobs=0)
    generation = pb.Generation(input=input_of(question), sampling=sampling)
    request = worker_pb2.RunGenerationRequest(request_id=question.id, generation=generation, tenant="benchmark")
    chunks = [message.chunk async for message in stub.RunGeneration(request)]
    logprobs = [round(position.chosen.logprob, 3) for chunk in chunks for position in chunk.logprobs]
    right = question.is_right("".join(chunk.text for chunk in chunks))
    return {"id": question.id, "right": right, "chosen": logprobs}


def join(files: Sequence[Path]) -> None:
    """One line for each question that the large model answered, with what the small ones made of it."""
    names = (SMALL[0], LARGE, SMALL[1])
    told = {
        name: {entry["id"]: entry for entry in map(json.loads, file.read_text().splitlines())}
        for name, file in zip(names, files, strict=True)
    }
    with ANSWERS.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["id", *names, *(f"{name}_logprobs" for name in SMALL)])
        for id_ in sorted(told[LARGE]):
            rights = [int(told[name][id_]["right"]) if id_ in told[name] else "" for name in names]
            logprobs = [" ".join(f"{p:.3f}" for p in told[name].get(id_, {"chosen": []})["chosen"]) for name in SMALL]
            out.writerow([id_, *rights, *logprobs])


def write_doubts(pair: Pair) -> None:
    """How much doubt is usual, for the router."""
    doubts = [round(doubt, 4) for doubt in quantiles_of(pair.doubt(MEASURES["three least likely tokens"]).tolist())]
    DOUBTS.write_text(json.dumps({"version": "answers-1", "quantiles": doubts}, indent=1) + "\n")


def main() -> None:
    parser = option_parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ask", type=Path, metavar="FILE", help="ask this model")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="where its answers go")
    parser.add_argument("--most", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument(
        "--join", type=Path, nargs="+", metavar="JSONL", help="answers of the small and the large model"
    )
    parser.add_argument("--embed", type=Path, metavar="FILE", help="have this model read the prompts, too")
    parser.add_argument("--train", action="store_true", help="write the router's file")
    arguments = parser.parse_args()
    if arguments.ask:
        if not arguments.out:
            sys.exit("--ask needs --out")
        asyncio.run(ask(arguments.ask, arguments.out, arguments.most, arguments.threads))
        return
    if arguments.join:
        join(arguments.join)
    with ANSWERS.open() as file:
        answers = list(csv.DictReader(file))
    asked = {question.id: question for question in questions()}
    rows: list[Row] = []
    more: dict[str, Any] = {}
    for name in SMALL:
        for which in ("common", "other", "all"):
            pair = Pair(name, answers, asked, which)
            wanted = arguments.embed and (name, which) == (SMALL[0], "all")
            read = asyncio.run(read_by(arguments.embed, pair)) if wanted else None
            found, details = evaluate(pair)
            rows += found
            more[pair.name] = {**details, "by_the_prompt": by_the_prompt(pair, read)}
            if arguments.train and (name, which) == (SMALL[0], "all"):
                write_doubts(pair)
    report("cascades", rows, arguments.json, **more)
    for name, found in more.items():
        print(f"{name}: {json.dumps(found, indent=1)}")


if __name__ == "__main__":
    main()
