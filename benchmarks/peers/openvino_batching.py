"""Peer: OpenVINO GenAI's continuous batching with its prefix cache, on a folder that `models.py` wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from protocol import THREADS, Run, serve

CACHE_GB = 1
# Small enough that a long prompt is cut into chunks beside which running streams go on: its default, said aloud.
STEP_TOKENS = 256


class Pipeline:
    """One pipeline, stepped by the workload that runs."""

    def __init__(self, folder: Path) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_batched_tokens = STEP_TOKENS
        properties = {"INFERENCE_NUM_THREADS": THREADS}
        self._pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._id = 0

    def run(self, work: Run) -> None:
        handles: dict[int, Any] = {}
        while not work.done:
            for index in work.due():
                handles[index] = self._add(work.prompts[index], work.new[index])
            self._pipe.step()
            for index, handle in handles.items():
                while handle.can_read():
                    for output in handle.read().values():
                        work.came(index, len(output.generated_ids))

    def _add(self, prompt: list[int], new: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        self._id += 1
        return self._pipe.add_request(self._id, openvino.Tensor(np.array([prompt], dtype=np.int64)), config)


def start() -> tuple[dict[str, Any], Any]:
    pipeline = Pipeline(Path(sys.argv[1]))
    return {"version": f"OpenVINO GenAI {genai.__version__}"}, pipeline.run


if __name__ == "__main__":
    serve(start)
