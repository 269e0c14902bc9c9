"""Serves a tiny model with kernels that are specialized, as on a device, and not launched. Prints what had to be
compiled for the start, and then while serving. Run by test_gpu_compilations.py in a process of its own."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from meshlm.kernels.gpu import attention_splits, checks, matmul_launch, paged_attention, prefill_attention, sample
from meshlm.kernels.gpu.capabilities import shared_limit
from meshlm.worker.engine import gpu_load
from meshlm.worker.engine.engine import Engine
from meshlm.worker.engine.gpu_warm_up import warm_up
from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.engine.settings import RunnerSettings
from meshlm.worker.messages import Limits, Sampling, Submit

compiled: list[str] = []


class NoKernel:
    """What a compiled kernel is to the launcher."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None: ...

    def run(self, *_: object) -> None: ...


def compile_nothing(kernel: Any, key: str, signature: object, device: int, *_: object) -> NoKernel:
    compiled.append(f"{kernel.fn.__name__} {key}")
    return kernel.device_caches[device][0].setdefault(key, NoKernel())


def pretend(architecture: int) -> None:
    """A device of this capability, on which nothing runs; what asks about the device gets its answers."""
    target = GPUTarget("cuda", architecture, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    JITFunction._do_compile = compile_nothing
    checks.INTERPRETED = gpu_load.INTERPRETED = SimpleNamespace(value=True)
    gpu = matmul_launch.gpu_with(132, architecture // 10, shared_limit(architecture))
    matmul_launch.gpu_of = lambda device: gpu
    sample.device_major = lambda device: gpu.major
    prefill_attention.capability_of = lambda device: divmod(architecture, 10)
    for module in (attention_splits, paged_attention, prefill_attention):
        module.processors_of = lambda device: gpu.processors


def request(generator: random.Random, name: str, longest: int, vocabulary: int) -> Submit:
    length = generator.choice([1, 2, 3, generator.randint(1, 40), generator.randint(1, longest - 8)])
    prompt = [generator.randrange(vocabulary) for _ in range(length)]
    kind = generator.randrange(12)
    reads: dict[str, Any] = {}
    if kind == 0 and length > 1:
        reads = {"score_from": generator.randint(1, length - 1)}
    elif kind == 1:
        reads = {"pool": generator.choice(["mean", "last"])}
    sampling: dict[str, Any] = {"temperature": generator.choice([0.0, 0.9]), "top_k": generator.choice([0, 5])}
    if kind == 2:
        sampling |= {"logprobs": generator.randint(0, 5)}
    elif kind in (3, 4):
        sampling |= {"logit_bias": dict.fromkeys(range(generator.randint(1, vocabulary)), 0.0)}
    elif kind == 5:
        sampling |= {"presence_penalty": 0.5}
    limits = Limits(max_tokens=generator.randint(1, 20), min_tokens=2 * (kind == 6), stop_token_ids=frozenset([1, 2]))
    return Submit(id=name, prompt=prompt, sampling=Sampling(**sampling), limits=limits, **reads)


def main() -> None:
    folder, architecture, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    pretend(architecture)
    torch.set_num_threads(1)
    scheduling = SchedulerSettings(max_running=12, max_waiting=64, chunk_tokens=100, step_tokens=200)
    settings = RunnerSettings(
        model=folder, engine="triton", dtype="bfloat16", kv_blocks=40, max_running=scheduling.max_running,
        step_tokens=scheduling.step_tokens, **options,
    )  # fmt: skip
    runner: Any = load_runner(settings, lambda stage, done, total: None)
    facts = runner.facts
    with torch.inference_mode():
        for size in runner._steps._graphs.sizes:  # as the capture of graphs does it
            runner._steps._memory.zero_()
            runner._steps._decode(size)
    warm_up(runner._steps, facts, settings.step_tokens)
    before = len(compiled)
    engine, generator, sent = Engine(runner, scheduling), random.Random(architecture), 0
    while engine.busy or sent < 150:
        for _ in range(generator.choice([0, 0, 1, 3]) if sent < 150 else 0):
            engine.submit(request(generator, str(sent), facts.max_context, facts.vocab_size))
            sent += 1
        engine.step()
    print(
        json.dumps(
            {"start": before, "kernels": sorted({name.split()[0] for name in compiled}), "serving": compiled[before:]}
        )
    )


if __name__ == "__main__":
    main()
