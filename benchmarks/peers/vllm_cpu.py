"""Peer: vLLM's CPU build, its engine in this process, on a Hugging Face folder. Arguments: the folder and a dtype."""

from __future__ import annotations

import os
import sys
from typing import Any

from protocol import THREADS, Run, serve

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
# Not needed for text, and of a build that does not fit to this torch: as if they were not installed.
sys.modules |= dict.fromkeys(("torchvision", "torchaudio", "torchcodec"))  # type: ignore[arg-type]


def start() -> tuple[dict[str, Any], Any]:
    import vllm  # after the environment is set

    folder, dtype = sys.argv[1:]
    engine = vllm.LLMEngine.from_engine_args(
        vllm.EngineArgs(model=folder, dtype=dtype, max_model_len=4096, max_num_seqs=32, enable_prefix_caching=True)
    )
    counter = iter(range(1 << 60))

    def run(work: Run) -> None:
        indices: dict[str, int] = {}
        while not work.done:
            for index in work.due():
                sampling = vllm.SamplingParams(
                    temperature=0, max_tokens=work.new[index], min_tokens=work.new[index], ignore_eos=True
                )
                name = str(next(counter))
                indices[name] = index
                engine.add_request(name, {"prompt_token_ids": work.prompts[index]}, sampling)
            for output in engine.step():
                index = indices[output.request_id]
                work.came(index, len(output.outputs[0].token_ids) - work.count(index))

    return {"version": f"vLLM {vllm.__version__}"}, run


if __name__ == "__main__":
    serve(start)
