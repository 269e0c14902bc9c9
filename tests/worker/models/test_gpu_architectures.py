"""Every architecture on the Triton kernels, interpreted where there is no GPU, against transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from meshlm.worker.engine.gpu_runner import GpuRunner
from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.sequence import Chunk, Sequence
from meshlm.worker.engine.settings import RunnerSettings
from meshlm.worker.messages import Limits, Sampling, Submit
from tests.worker.models.decoding import their_logits
from tests.worker.models.test_architectures import FOLDERS_ONLY, MODELS, TOKENS, make

pytest.importorskip("triton")
pytestmark = pytest.mark.oracle

SHORT = TOKENS[:70]  # beyond the original context of longrope
CUTS = (0, 33, 69, 70)  # the last position is computed alone, as a decode, and so is one of the chunks' ends
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits_at_cuts(path: Path, **settings: Any) -> torch.Tensor:
    """Of the last position of each chunk."""
    wanted = {"kv_blocks": 12, "threads": 2, "dtype": "float32", "device": DEVICE} | settings
    runner = load_runner(RunnerSettings(model=path, engine="triton", **wanted), lambda stage, done, total: None)
    assert isinstance(runner, GpuRunner)
    request = Submit(id="x", prompt=SHORT, sampling=Sampling(), limits=Limits(max_tokens=1))
    one = Sequence(request, list(SHORT), blocks=list(range(10, 0, -1)))
    chunks = [Chunk(one, start, end - start, True) for start, end in itertools.pairwise(CUTS)]
    return torch.cat([runner.logits([chunk]) for chunk in chunks])


@pytest.mark.parametrize("name", [*MODELS, *FOLDERS_ONLY])
def test_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    theirs = their_logits(model, SHORT)[[end - 1 for end in CUTS[1:]]]
    ours = logits_at_cuts(tmp_path, quantization="none").cpu()
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen2"])
def test_int8_weights_stay_close(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    exact = logits_at_cuts(tmp_path, quantization="none")
    rounded = logits_at_cuts(tmp_path, quantization="int8")
    assert torch.cosine_similarity(exact, rounded).min() > 0.995
    assert not torch.equal(exact, rounded)
