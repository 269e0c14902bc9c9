"""Prompt entropy: what it tells attacks from ordinary text, by which statistic, and what it costs the innocent.

Texts of 31 ordinary classes and 8 kinds of attack (`entropy_data`), each read by the router's n-gram table and by
SmolLM2-135M behind a real worker (`Score`, one thread), and by what needs no model: byte entropy and compression.
Figures: area under the ROC curve, true positives at 1% false positives, each class's surprise, and the mean weight that
it gets from it (1 + 7 r^2, r at most 0.5).
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from entropy_data.texts import attacks, benign
from harness import Row, option_parser, report
from numpy.typing import NDArray

from meshlm.chassis.channels import open_channel
from meshlm.mesh.model import model_path
from meshlm.router.measure import byte_entropy, texture
from meshlm.router.risk.surprise import FEW, WINDOW, Estimator, Surprise, ends_of, peak, risk_of
from meshlm.router.risk.weight import weight_of
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2, worker_pb2_grpc
from meshlm.worker.loading.gguf_file import GgufFile

TOKENS = 512
TABLE, MODEL = "n-gram table", "SmolLM2"
Texts = Mapping[str, Sequence[str]]
Values = dict[str, NDArray[np.float64]]


class Reader:
    """Scores texts at a worker of its own."""

    def __init__(self, channel: object) -> None:
        self._stub = worker_pb2_grpc.WorkerServiceStub(channel)  # type: ignore[no-untyped-call]
        self.revision = ""
        self.tokens = 0
        self.seconds = 0.0

    async def read(self, text: str) -> tuple[float, float]:
        """Largest window mean of (surprisal - entropy), and mean surprisal; nats a token. NaN where it is too short."""
        peaks, means = [], []
        for part in ends_of(text, TOKENS):
            request = worker_pb2.ScoreRequest(input=pb.Input(prompt=part.decode("utf-8", "ignore")))
            begun = time.perf_counter()
            answer = await self._stub.Score(request, timeout=300)
            self.seconds += time.perf_counter() - begun
            self.revision = answer.model_revision
            self.tokens += answer.usage.prompt_tokens
            scored = answer.scored[0]
            if len(scored.logprobs) >= FEW:
                surprisal = [-logprob for logprob in scored.logprobs]
                peaks.append(peak(surprisal, scored.entropies, WINDOW))
                means.append(float(np.mean(surprisal)))
        return (max(peaks), max(means)) if peaks else (float("nan"), float("nan"))


async def by_model(texts: Texts) -> tuple[Values, Values, Reader]:
    """Surprise and mean surprisal of all texts, by SmolLM2 on one thread."""
    with tempfile.TemporaryDirectory(prefix="meshlm-") as folder:
        environment = {
            **os.environ,
            "MESHLM__WORKER__MODEL_PATH": str(model_path()),
            "MESHLM__WORKER__THREADS": "1",
            "MESHLM__WORKER__SERVER__LISTEN": f"unix:{folder}/w",
            "MESHLM__WORKER__SERVER__ADMIN_LISTEN": "",
            "MESHLM__TELEMETRY__LOG_LEVEL": "error",
        }
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "meshlm.worker.main", env=environment)
        channel = open_channel(f"unix:{folder}/w")
        try:
            watch = worker_pb2_grpc.WorkerServiceStub(channel).WatchLoad(  # type: ignore[no-untyped-call]
                worker_pb2.WatchLoadRequest(watcher="benchmark"), wait_for_ready=True, timeout=300
            )
            async for load in watch:
                if load.ready:
                    break
            watch.cancel()
            reader = Reader(channel)
            found = {name: [await reader.read(text) for text in group] for name, group in texts.items()}
        finally:
            await channel.close()
            process.terminate()
            await process.wait()
    peaks = {name: _array([value for value, _ in pairs]) for name, pairs in found.items()}
    means = {name: _array([value for _, value in pairs]) for name, pairs in found.items()}
    return peaks, means, reader


def by_table(texts: Texts) -> tuple[Values, str, float]:
    """Surprise by the n-gram table, its version, and milliseconds for 1,000 tokens of 4 bytes."""
    estimator, version = Estimator(), ""
    found: Values = {}
    for name, group in texts.items():
        read = [estimator.surprise(text, TOKENS) for text in group]
        found[name] = _array([one.nats if one is not None else float("nan") for one in read])
        version = next((one.source for one in read if one is not None), version)
    long = "".join(texts["long prose, 4,000 characters"])[:4000]
    took = []
    for _ in range(200):
        begun = time.perf_counter()
        estimator.surprise(long, TOKENS)
        took.append(time.perf_counter() - begun)
    return found, version, float(np.median(took)) * 1000


def without_model(texts: Texts) -> dict[str, Values]:
    """Byte entropy (bits a byte), and how little a text can be compressed."""
    compressed = {n: [texture(pb.Input(prompt=t)).compression for t in group] for n, group in texts.items()}
    entropy = {n: [byte_entropy(t.encode()) for t in group] for n, group in texts.items()}
    return {
        "byte entropy": {name: np.array(values) for name, values in entropy.items()},
        "compression ratio": {name: np.array(values) for name, values in compressed.items()},
    }


def _array(values: Sequence[float]) -> NDArray[np.float64]:
    found = np.array(values)
    return found[~np.isnan(found)]


def auc(calm: NDArray[np.float64], attack: NDArray[np.float64]) -> float:
    """The chance that an attack has the larger value; ties count half."""
    below = np.searchsorted(np.sort(calm), attack, "left") + np.searchsorted(np.sort(calm), attack, "right")
    return float(below.sum() / (2 * len(calm) * len(attack)))


@dataclass
class Curve:
    """How well a statistic tells one kind of attack from ordinary texts."""

    attack: str
    statistic: str
    area: float  # under the ROC curve
    found: float  # share of attacks above what 99% of ordinary texts stay below
    texts: int


@dataclass
class Cost:
    """What a class of texts pays for a statistic."""

    kind: str
    statistic: str
    middle: float  # median surprise, nats
    largest: float
    weight: float  # mean
    texts: int


def curves(statistic: str, values: Values, ordinary: Texts, attacking: Texts) -> list[Curve]:
    calm = np.concatenate([values[kind] for kind in ordinary])
    bound = float(np.quantile(calm, 0.99))
    found = []
    for kind in attacking:
        attack = values[kind]
        found.append(Curve(kind, statistic, auc(calm, attack), float((attack > bound).mean()), len(attack)))
    return found


def costs(statistic: str, values: Values, source: str) -> list[Cost]:
    found = []
    for kind, nats in values.items():
        weights = [weight_of(risk_of(Surprise(float(value), source), {})) for value in nats]
        middle, largest = float(np.median(nats)), float(nats.max())
        found.append(Cost(kind, statistic, middle, largest, float(np.mean(weights)), len(nats)))
    return found


def show(told_curves: Sequence[Curve], told_costs: Sequence[Cost]) -> None:
    """Two tables, in Markdown."""
    statistics = list(dict.fromkeys(one.statistic for one in told_curves))
    print("\n| attack | " + " | ".join(statistics) + " |\n" + "| --- " * (len(statistics) + 1) + "|")
    for kind in dict.fromkeys(one.attack for one in told_curves):
        cells = {c.statistic: f"{c.area:.3f} / {c.found:.0%}" for c in told_curves if c.attack == kind}
        print(f"| {kind} | " + " | ".join(cells.get(name, "") for name in statistics) + " |")
    statistics = list(dict.fromkeys(one.statistic for one in told_costs))
    print("\n| text | " + " | ".join(f"{name} | weight" for name in statistics) + " |")
    print("| --- " * (2 * len(statistics) + 1) + "|")
    for kind in dict.fromkeys(one.kind for one in told_costs):
        of = {c.statistic: c for c in told_costs if c.kind == kind}
        cells_ = [f"{of[n].middle:.2f}, {of[n].largest:.2f} | {of[n].weight:.3f}" for n in statistics if n in of]
        print(f"| {kind} | " + " | ".join(cells_) + " |")
    print()


def rows_of(told_curves: Sequence[Curve], told_costs: Sequence[Cost]) -> list[Row]:
    rows = []
    for c in told_curves:
        rows.append(Row(f"{c.attack}: AUC, {c.statistic}", "1", c.area, c.texts, 0.0, limit=1.0))
        rows.append(Row(f"{c.attack}: found at 1% false, {c.statistic}", "1", c.found, c.texts, 0.0, limit=1.0))
    rows += [Row(f"{c.kind}: mean weight, {c.statistic}", "1", c.weight, c.texts, 0.0, limit=2.75) for c in told_costs]
    return rows


def ramp(name: str, values: Values, ordinary: Texts, attacking: Sequence[str]) -> str:
    """What a ramp by quantiles would be: from what 99.5% of ordinary texts stay below to what 95% of attacks pass."""
    calm = float(np.quantile(np.concatenate([values[kind] for kind in ordinary]), 0.995))
    alarm = float(np.quantile(np.concatenate([values[kind] for kind in attacking]), 0.05))
    return f"{name}: 99.5% of ordinary texts below {calm:.2f} nats, 95% of attacks above {alarm:.2f}"


def vocabulary() -> list[str]:
    """Texts of SmolLM2's tokens that are whole characters."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in letters]
    byte_of = {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    found = []
    for token in GgufFile(model_path()).metadata["tokenizer.ggml.tokens"]:
        data = bytes(byte_of[letter] for letter in token if letter in byte_of)
        try:
            found.append(data.decode())
        except UnicodeDecodeError:
            continue
    return [token for token in found if token]


def main() -> int:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--no-model", action="store_true", help="the table alone")
    chosen = parser.parse_args()
    ordinary, attacking = benign(20 if chosen.quick else 120), attacks(20 if chosen.quick else 120, vocabulary())
    texts = {**ordinary, **attacking}
    table, version, milliseconds = by_table(texts)
    told_curves, told_costs = curves(TABLE, table, ordinary, attacking), costs(TABLE, table, version)
    notes = [ramp(TABLE, table, ordinary, ["random printable characters"])]
    for name, values in without_model(texts).items():
        told_curves += curves(name, values, ordinary, attacking)
    if not chosen.no_model:
        fewer = {name: group[:: max(1, len(group) // (3 if chosen.quick else 30))] for name, group in texts.items()}
        peaks, means, reader = asyncio.run(by_model(fewer))
        told_curves = curves(MODEL, peaks, ordinary, attacking) + told_curves
        told_curves += curves("mean surprisal, SmolLM2", means, ordinary, attacking)
        told_costs = costs(MODEL, peaks, reader.revision) + told_costs
        notes.append(ramp(MODEL, peaks, ordinary, [kind for kind in attacking if "random" in kind or "GCG" in kind]))
        notes.append(
            f"SmolLM2 read {reader.tokens:,} tokens, {reader.tokens / reader.seconds:.0f} a second on a thread"
        )
    time_row = Row("n-gram table, 1,000 tokens", "ms", milliseconds, 200, 0.0, limit=1.0, goal="under 1")
    show(told_curves, told_costs)
    print(*notes, sep="\n")
    report("entropy", [time_row, *rows_of(told_curves, told_costs)], chosen.json, notes=notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
