"""Nothing is compiled while serving: the warm-up has launched every kernel with arguments of every kind.

On a device the same is asked by `test_nothing_is_compiled_while_it_serves`. Here Triton's own launcher says of each
launch what it would compile, on a made-up device of each family, see `compilations.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=640, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("architecture", "options", "used"),
    [
        (90, {"block_size": 64}, {"_prefill_hopper", "_prefill"}),
        (80, {"block_size": 16, "quantization": "int4"}, {"_prefill", "skinny_kernel", "tall_kernel"}),
        (120, {"block_size": 64, "quantization": "int8", "kv_dtype": "int4"}, {"_prefill", "skinny_kernel"}),
    ],
    ids=["sm_90", "sm_80-int4", "sm_120-int8"],
)
def test_nothing_is_compiled_that_the_warm_up_has_not(
    folder: Path, architecture: int, options: dict[str, Any], used: set[str]
) -> None:
    command = [
        sys.executable,
        Path(__file__).with_name("compilations.py"),
        folder,
        str(architecture),
        json.dumps(options),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout.splitlines()[-1])
    assert used | {"_decode", "_merge", "_count", "_survey", "_choose"} <= set(told["kernels"])
    assert told["start"] > 20
    assert told["serving"] == []
