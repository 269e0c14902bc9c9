"""A model that another process reads: what the engine gets, and what it is told where that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meshlm.kernels.native.library import open_library
from meshlm.kernels.native.packed import PackedMatrix
from meshlm.worker.engine.load import OpenedModel
from meshlm.worker.engine.loaded import LoadingFailedError, loading
from meshlm.worker.engine.settings import runner_settings
from meshlm.worker.loading.errors import ModelFileError
from tests.worker.models.test_architectures import make

pytest.importorskip("transformers")

ENDED = r"the loading process ended"


def settings(path: Path, **changes: Any) -> dict[str, Any]:
    return {"model": str(path), "engine": "native", "quantization": "int4", "threads": 1, "max_context": 64} | changes


def parts(value: Any, place: str = "") -> dict[str, Any]:
    """What a decoder is made of, by where it stands: matrices as their format, shape and bytes, vectors as arrays."""
    if isinstance(value, PackedMatrix):
        return {place: (value.format, value.rows, value.cols, bytes(value.memory))}
    if isinstance(value, torch.Tensor | np.ndarray):
        return {place: np.asarray(value)}
    if isinstance(value, tuple):
        return {name: part for i, one in enumerate(value) for name, part in parts(one, f"{place}[{i}]").items()}
    if hasattr(value, "__dataclass_fields__") and type(value).__name__ != "ModelConfig":
        fields = value.__dataclass_fields__
        return {name: part for f in fields for name, part in parts(getattr(value, f), f"{place}.{f}").items()}
    return {place: value}


# A tied head and biases; experts; two ropes, and norms of queries and keys.
@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gemma3"])
def test_the_decoder_is_what_this_process_would_have_read(tmp_path: Path, name: str) -> None:
    make(name).save_pretrained(tmp_path)
    chosen = settings(tmp_path)
    here = OpenedModel.of(runner_settings(chosen), open_library())
    told: list[tuple[int, int]] = []
    with loading(chosen, "error", "json") as model:
        assert (model.config, model.quantization, model.threads) == (here.config, "int4", 1)
        decoder = model.decoder(lambda done, total: told.append((done, total)))
    ours, theirs = parts(decoder), parts(here.decoder(lambda done, total: None))
    assert ours.keys() == theirs.keys()
    for place, part in theirs.items():
        if isinstance(part, np.ndarray):
            np.testing.assert_array_equal(ours[place], part, err_msg=place)
        else:
            assert ours[place] == part, place
    assert (decoder.head is decoder.embedding) == here.config.tied_head
    assert told == [(done, here.config.layers) for done in range(1, here.config.layers + 1)]


def test_what_is_wrong_with_the_files_is_told_as_if_this_process_had_read_them(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as missing, loading(settings(tmp_path / "none"), "error", "json"):
        pass
    assert missing.value.path == tmp_path / "none"
    make("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with (
        pytest.raises(ModelFileError, match=str(tmp_path)),
        loading(settings(tmp_path), "error", "json") as model,
    ):
        model.decoder(lambda done, total: None)


def children() -> set[int]:
    """Of this thread."""
    return {int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the children")
def test_a_loading_process_that_is_killed_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    before = children()
    with pytest.raises(LoadingFailedError, match=ENDED), loading(settings(tmp_path), "error", "json") as model:
        [process] = children() - before
        os.kill(process, signal.SIGKILL)
        while True:  # what it had sent is still read
            model.decoder(lambda done, total: None)
    assert process not in children()


USE = """
import sys
from meshlm.worker.engine.loaded import loading
from meshlm.worker.engine.native_load import native_library, native_runner
from meshlm.worker.engine.sequence import Chunk, Sequence
from meshlm.worker.engine.settings import runner_settings
from meshlm.worker.messages import KvBudget, Limits, Sampling, Submit

fields = {"model": sys.argv[1], "kv_dtype": "int4", "threads": 1, "kv_blocks": 8}
settings = runner_settings(fields)
with loading(fields, "error", "json") as model:
    runner = native_runner(settings, model, native_library(settings), lambda stage, done, total: None)
sampling = Sampling(logprobs=2, frequency_penalty=1.0, logit_bias={3: 1.0})
request = Submit(id="0", prompt=[1, 2, 3], sampling=sampling, limits=Limits(max_tokens=4))
[drawn] = runner.run([Chunk(Sequence(request, [1, 2, 3], blocks=[0]), 0, 3, True)])
print(len(drawn.top), "torch" in sys.modules)
"""


def test_an_engine_that_computes_natively_never_loads_torch(tmp_path: Path) -> None:
    """Neither to load a model, nor for a 4-bit cache, nor for what is done to logits before a draw."""
    make("llama").save_pretrained(tmp_path)
    told = subprocess.run(
        [sys.executable, "-c", USE, tmp_path], check=True, capture_output=True, text=True, timeout=240
    )
    assert told.stdout.split() == ["2", "False"]
