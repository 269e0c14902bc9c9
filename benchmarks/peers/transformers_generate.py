"""Peer: `transformers` `generate` in fp32 on the weights of a GGUF file. One JSON line a request.

Request {"batch", "prompt", "new"}: greedy, fixed lengths, random prompts. Answer {"ttft", "seconds"}: to one token, to
all of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    torch.set_num_threads(2)
    path = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    print(json.dumps({"parameters": model.num_parameters()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(model, **json.loads(line))), flush=True)


@torch.inference_mode()
def measure(model: Any, batch: int, prompt: int, new: int) -> dict[str, float]:
    ids = torch.randint(1000, 40_000, (batch, prompt))
    mask = torch.ones_like(ids)
    begun = time.perf_counter()
    model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=1)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new)
    return {"ttft": first, "seconds": time.perf_counter() - begun}


main()
