"""The engine beside llama.cpp, OpenVINO GenAI, CTranslate2 and vLLM: the same weights, prompts, lengths and threads.

Ours is the worker's engine process with its production defaults, asked over its sockets as the front does. Cases:
decode at batch 1 (prompt 32, 128 new), prefill of 512, 16 concurrent (prompt 64, 128 new), 16 with a shared prefix of
512, and a prompt of 2,000 that arrives among 8 streams. In each turn each case goes around: every implementation in its
turn, the others stopped. The same engine through the whole mesh comes last.
"""

from __future__ import annotations

import asyncio
import random
import shlex
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from bandwidth import read_bandwidth
from engine_report import OURS, Results, as_json, page, peers_table, rows_of
from harness import Row, median, option_parser, report, spread
from our_engine import OurEngine
from peer_engines import PeerEngine, Unmeasured, started
from serve import THREADS, Target, mesh, of_text, together
from workload import Prompts, Request, figures, workloads

from meshlm.mesh.model import model_path
from meshlm.worker.config import WorkerConfig

MB = 1e6


async def measure_all(ours: OurEngine, peers: Sequence[PeerEngine], turns: int) -> Results:
    """Every case, every implementation in its turn, `turns` times; a first short run of each warms it up."""
    results = Results()
    warm_up = [Request(Prompts(seed=1 << 20).ids(32), 16)]
    await ours.run(warm_up)
    for peer in peers:
        await asyncio.to_thread(peer.run, warm_up)
    for turn in range(turns):
        for case, requests in workloads(turn).items():
            results.add(OURS, figures(case, await ours.run(requests)))
            for peer in peers:
                if (peer.name, case) in results.unable:
                    continue
                try:
                    trace = await asyncio.to_thread(peer.run, requests)
                    results.add(peer.name, figures(case, trace))
                except Unmeasured as reason:
                    results.unable[peer.name, case] = str(reason)
    results.memory = {OURS: ours.memory} | {peer.name: peer.memory for peer in peers}
    return results


async def shares_of_the_mesh(ours: OurEngine, turns: int) -> list[Row]:
    """Speed through router, guard, cache and front over the engine's alone: prompts of the same lengths, in turn."""
    prompts = Prompts(seed=1 << 21)
    names = {1: "mesh_share_b1", 16: "mesh_share_16"}
    through: dict[int, list[float]] = {1: [], 16: []}
    alone: dict[int, list[float]] = {1: [], 16: []}
    random.seed(0)
    async with mesh() as running:
        router = Target(running.target, running.key)
        await router.run(of_text(16))
        for _ in range(turns):
            for count in names:
                rate, samples = await together(router, lambda: of_text(128), count)
                through[count].append(1 / samples[0].tpot if count == 1 else rate)
                trace = await ours.run([Request(prompts.ids(sample.prompt), 128) for sample in samples])
                alone[count].append(figures("decode", trace)["decode_b1"] if count == 1 else trace.rate)
        await router.close()
    return [
        Row(name, "of the engine's tok/s", median(through[count]) / median(alone[count]), turns, spread(through[count]),
            "the engine alone, tok/s", median(alone[count]), None, goal="at least 0.90")
        for count, name in names.items()
    ]  # fmt: skip


def limits(ours: OurEngine, results: Results, bandwidth: float) -> list[Row]:
    """Where the machine ends: the weights read for a token at batch 1, over what it can read; and memory."""
    read = [ours.facts.weight_bytes * rate / bandwidth for rate in results.runs[OURS]["decode_b1"]]
    share = Row("bandwidth_share", "of read bandwidth", median(read), len(read), spread(read), "read bandwidth, GB/s",
                bandwidth / 1e9, limit=1.0, goal="at least 0.85")  # fmt: skip
    ours_mb = results.memory[OURS] / MB
    others = {name: peak / MB for name, peak in results.memory.items() if name != OURS}
    least = min(others, key=lambda name: others[name], default="")
    ratio = others[least] / ours_mb if least else None
    memory = Row("memory_mb", "MB", ours_mb, 1, 0.0, least, others.get(least), ratio, limit=500.0, goal="under 500")
    return [share, memory]


async def measure(turns: int, names: Sequence[str] | None) -> tuple[list[Row], Results]:
    """`names`: which peers; none of them where it is None."""
    ours, peers, absent = OurEngine(WorkerConfig(model_path=model_path(), threads=THREADS)), [], {}
    async with AsyncExitStack() as stack:
        await ours.start()
        stack.push_async_callback(ours.stop)
        for name, peer in started(model_path(), names) if names is not None else ():
            if isinstance(peer, str):
                absent[name] = peer
            else:
                stack.callback(peer.close)
                peers.append(peer)
        results = await measure_all(ours, peers, turns)
        results.absent = absent
        results.versions = {OURS: ours.facts.engine} | {peer.name: peer.version for peer in peers}
        rows = rows_of(results, 8 * ours.facts.weight_bytes / ours.facts.parameters)
        rows += limits(ours, results, read_bandwidth(THREADS))
        rows += await shares_of_the_mesh(ours, turns)
    return rows, results


def main() -> None:
    parser = option_parser(__doc__ or "")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="measure these peers too; all where none is named")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page for results/ there")
    chosen = parser.parse_args()
    rows, results = asyncio.run(measure(2 if chosen.quick else 5, chosen.peers))
    report("engine", rows, chosen.json, **as_json(results))
    print("\n" + peers_table(results))
    if chosen.page is not None:
        chosen.page.write_text(page(rows, results, shlex.join([".venv/bin/python", *sys.argv])))


if __name__ == "__main__":
    main()
