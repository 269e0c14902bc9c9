"""Routing between a small and a large model: right answers bought for each share of requests that the large one gets.

Reads what both models made of `question_sets.py` (`model_answers.csv`, from runs of `model_answers.py`), and draws the
scorer's quality-cost curve, each question scored by what was learned from the other nine tenths: beside chance, the
prompt's length, the small model's doubt (which it must answer for, first), and an oracle that knows both answers.
`--train` learns from all of them and writes the scorer that the router ships. Runs in seconds: no model is asked again,
unless `--embed FILE.gguf` has the small model read each question, to learn from its hidden states beside the features.
"""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Row, option_parser, report
from model_answers import worker
from question_sets import FOLDS, Question, questions

from meshlm.router.routing.complexity import FEATURES, Scorer, features, parse
from meshlm.router.routing.quantiles import quantiles_of
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

ANSWERS = ROOT / "benchmarks/model_answers.csv"
SCORER = ROOT / "services/router/meshlm/router/routing/complexity.json"
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
RESAMPLES, SEED = 2000, 6
SMALL_SHARE = 0.8

Array = Any  # of numpy


class Answered:
    """Questions that both models answered. `small`, `large`: 1 where it was right; `small_sure`: log-probability
    that the small one gave its answer."""

    def __init__(self, asked: Sequence[Question], right: dict[str, tuple[float, ...]]) -> None:
        self.questions = [question for question in asked if question.id in right]
        self.inputs = [_input(question) for question in self.questions]
        both = np.array([right[question.id] for question in self.questions], dtype=float)
        self.small, self.large, self.small_sure = both.T
        self.source = np.array([question.source for question in self.questions])
        self.fold = np.array([question.fold for question in self.questions])
        self.features = np.array([features(source) for source in self.inputs])

    @property
    def gain(self) -> Array:
        """What the large model adds: 1, 0 or -1."""
        return self.large - self.small


def read_answers(file: Path = ANSWERS) -> dict[str, tuple[float, ...]]:
    with file.open() as lines:
        rows = csv.DictReader(lines)
        return {row["id"]: (int(row["small"]), int(row["large"]), float(row["small_sure"])) for row in rows}


def ridge(x: Array, y: Array, penalty: float) -> tuple[Array, float]:
    """Weights for x as it is and the bias; the penalty is on the weights of standardised features."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale < 1e-9, np.inf, scale)  # what never varies teaches nothing
    z = (x - mean) / scale
    weights = np.linalg.solve(z.T @ z + penalty * np.eye(x.shape[1]), z.T @ (y - y.mean())) / scale
    return weights, float(y.mean() - mean @ weights)


def best_penalty(x: Array, y: Array) -> float:
    """The one whose predictions of left-out folds are the nearest."""
    fold = np.random.default_rng(SEED).permutation(len(y)) % FOLDS

    def loss(penalty: float) -> float:
        total = 0.0
        for number in range(FOLDS):
            weights, bias = ridge(x[fold != number], y[fold != number], penalty)
            total += float(((x[fold == number] @ weights + bias - y[fold == number]) ** 2).sum())
        return total

    return min(PENALTIES, key=loss)


def learn(data: Answered, rows: Array) -> tuple[Array, float, float]:
    """Weights, bias and penalty for the gain of these rows."""
    x, y = data.features[rows], data.gain[rows]
    penalty = best_penalty(x, y)
    return (*ridge(x, y, penalty), penalty)


def scorer_of(data: Answered, rows: Array, version: str) -> dict[str, Any]:
    """What `complexity.json` holds."""
    weights, bias, penalty = learn(data, rows)
    raw = Scorer(version, tuple(weights), bias, (0.0, 1.0))
    scores = [raw.score(source) for source, row in zip(data.inputs, rows, strict=True) if row]
    return {
        "version": version,
        "weights": {name: round(float(weight), 6) for name, weight in zip(FEATURES, weights, strict=True)},
        "bias": round(bias, 6),
        "quantiles": [round(score, 6) for score in quantiles_of(scores)],
        "learned": {"questions": int(rows.sum()), "penalty": penalty, "label": "large right - small right",
                    "small": "SmolLM2-135M-Instruct", "large": "Qwen2.5-Coder-1.5B-Instruct"},
    }  # fmt: skip


async def embed(data: Answered, model: Path) -> Array:
    """The small model's last hidden state of each question, with the chat's template: (questions, hidden size)."""
    found = []
    async with worker(model) as stub:
        for number, source in enumerate(data.inputs):
            request = worker_pb2.EmbedRequest(
                request_id=str(number), inputs=[source], pooling=worker_pb2.POOLING_LAST, tenant="benchmark"
            )
            found.append(list((await stub.Embed(request)).embeddings[0].vector))
    return np.array(found)


def out_of_fold(x: Array, data: Answered) -> Array:
    """Each question's predicted gain, by what was learned from the other folds."""
    score = np.zeros(len(x))
    for fold in range(FOLDS):
        rows = data.fold != fold
        weights, bias = ridge(x[rows], data.gain[rows], best_penalty(x[rows], data.gain[rows]))
        score[~rows] = x[~rows] @ weights + bias
    return score


def held_out(data: Answered) -> tuple[Array, Array]:
    """The score of each question and whether it goes to the large model, by a scorer and a threshold (for SMALL_SHARE)
    learned from the other folds."""
    scores, to_large = np.zeros(len(data.questions)), np.zeros(len(data.questions), dtype=bool)
    for fold in range(FOLDS):
        scorer = parse(scorer_of(data, data.fold != fold, "fold"))
        for number in np.flatnonzero(data.fold == fold):
            scores[number] = scorer.score(data.inputs[number])
            to_large[number] = scores[number] > scorer.threshold(SMALL_SHARE)
    return scores, to_large


def curve(score: Array, small: Array, gain: Array) -> Array:
    """Right answers, as a share, with the k questions of the highest scores sent to the large model; k from 0 to all.
    Among equal scores the order is chance."""
    order = np.lexsort((np.random.default_rng(SEED).random(len(score)), -score))
    return (small.sum() + np.concatenate([[0.0], np.cumsum(gain[order])])) / len(gain)


def apgr(line: Array) -> float:
    """Average performance gap recovered (RouteLLM): the mean over all shares of how far the curve is from the small
    model's right answers to the large one's. Chance: 0.5. Above 1 where what the small one alone gets right is left to
    it."""
    return float(((line - line[0]) / (line[-1] - line[0])).mean())


def at_share(line: Array, large: float) -> float:
    """The curve where `large` of the questions go to the large model."""
    return float(np.interp(large * (len(line) - 1), np.arange(len(line)), line))


def interval(score: Array, small: Array, gain: Array, value: Callable[[Array], float]) -> list[float]:
    """95%, by resampling the questions."""
    chance, found = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        drawn = chance.integers(0, len(score), len(score))
        line = curve(score[drawn], small[drawn], gain[drawn])
        if line[-1] > line[0]:
            found.append(value(line))
    return [round(float(end), 3) for end in np.percentile(found, [2.5, 97.5])]


def evaluate(data: Answered, wide: Array | None = None) -> tuple[list[Row], dict[str, Any]]:
    score, to_large = held_out(data)
    large = 1 - SMALL_SHARE

    def line(by: Array) -> Array:
        return curve(by, data.small, data.gain)

    def over_chance(drawn: Array) -> float:
        return at_share(drawn, large) - ((1 - large) * drawn[0] + large * drawn[-1])

    def row(name: str, value: float, peer: str, other: float, goal: str = "") -> Row:
        return Row(name, "share", value, len(score), 0.0, peer, other, value / other, goal=goal)

    ours = line(score)
    routed = float(np.where(to_large, data.large, data.small).mean())
    chance = ours[0] + to_large.mean() * (ours[-1] - ours[0])
    rows = [
        row("right_small", ours[0], "large model", ours[-1]),
        row("apgr", apgr(ours), "chance", 0.5),
        row("apgr_length_alone", apgr(line(data.features[:, FEATURES.index("length")])), "chance", 0.5),
        row("apgr_small_models_doubt", apgr(line(-data.small_sure)), "chance", 0.5),
        *([row("apgr_with_embedding", apgr(line(out_of_fold(wide, data))), "chance", 0.5)] if wide is not None else []),
        row("apgr_oracle", apgr(line(data.gain)), "chance", 0.5),
        row("right_at_80_small", at_share(ours, large), "chance, same share", (1 - large) * ours[0] + large * ours[-1]),
        row("right_at_50_small", at_share(ours, 0.5), "chance, same share", (ours[0] + ours[-1]) / 2),
        row("small_share_by_threshold", 1 - float(to_large.mean()), "wanted", SMALL_SHARE),
        row("right_by_threshold", routed, "chance, same share", chance),
    ]
    intervals = {
        "apgr": interval(score, data.small, data.gain, apgr),
        "apgr_small_models_doubt": interval(-data.small_sure, data.small, data.gain, apgr),
        "right_over_chance_at_80_small": interval(score, data.small, data.gain, over_chance),
    }
    if wide is not None:
        intervals["apgr_with_embedding"] = interval(out_of_fold(wide, data), data.small, data.gain, apgr)
    return rows, {"intervals_95": intervals, "sources": by_source(data, to_large), "unseen_sources": unseen(data)}


def by_source(data: Answered, to_large: Array) -> dict[str, dict[str, float]]:
    """Both models' right answers, and how many of a set's questions go to the large one."""
    found = {}
    for source in sorted(set(data.source.tolist())):
        rows = data.source == source
        found[source] = {
            "questions": int(rows.sum()),
            "small": round(float(data.small[rows].mean()), 3),
            "large": round(float(data.large[rows].mean()), 3),
            "to_large": round(float(to_large[rows].mean()), 3),
        }
    return found


def unseen(data: Answered) -> dict[str, Any]:
    """Each set scored by what was learned from the others only: whether more is known than which set it is."""
    score = np.zeros(len(data.questions))
    for source in set(data.source.tolist()):
        rows = data.source == source
        weights, bias, _ = learn(data, ~rows)
        score[rows] = data.features[rows] @ weights + bias
    return {
        "apgr": round(apgr(curve(score, data.small, data.gain)), 3),
        "interval": interval(score, data.small, data.gain, apgr),
    }


def _input(question: Question) -> pb.Input:
    return pb.Input(chat=pb.Chat(messages=[pb.Message(role="user", content=question.text)]))


def main() -> None:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--train", action="store_true", help="learn the scorer anew and write the router's file")
    parser.add_argument("--embed", type=Path, metavar="FILE", help="learn from this model's hidden states, too")
    arguments = parser.parse_args()
    data = Answered(questions(), read_answers())
    if arguments.train:
        everything = np.ones(len(data.questions), dtype=bool)
        SCORER.write_text(json.dumps(scorer_of(data, everything, "questions-1"), indent=1) + "\n")
    wide = None
    if arguments.embed:
        wide = np.hstack([data.features, asyncio.run(embed(data, arguments.embed))])
    rows, more = evaluate(data, wide)
    report("model_routing", rows, arguments.json, **more)
    for name, found in more.items():
        print(f"{name}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
