"""Every architecture in the native engine, against transformers' on the same tiny random weights."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from meshlm.worker.engine.load import load_runner
from meshlm.worker.engine.native_load import MOST_EXPERTS
from meshlm.worker.engine.native_runner import NativeRunner
from meshlm.worker.engine.sequence import Chunk, Sequence
from meshlm.worker.engine.settings import RunnerSettings, SettingsError
from meshlm.worker.messages import Limits, Sampling, Submit
from tests.worker.models.decoding import their_logits
from tests.worker.models.test_architectures import FOLDERS_ONLY, MODELS, TOKENS, make

pytestmark = pytest.mark.oracle

CUTS = (0, 1, 33, 90, 149, 150)  # the last position is computed alone, as a decode


def native(path: Path, quantization: str) -> NativeRunner:
    settings = RunnerSettings(
        model=path,
        engine="native",
        quantization=quantization,
        kv_dtype="float32",
        kv_blocks=12,
        threads=2,  # type: ignore[arg-type]
    )
    runner = load_runner(settings, lambda stage, done, total: None)
    assert isinstance(runner, NativeRunner)
    return runner


def logits_at_cuts(runner: NativeRunner) -> torch.Tensor:
    """Of the last position of each chunk."""
    request = Submit(id="x", prompt=TOKENS, sampling=Sampling(), limits=Limits(max_tokens=1))
    one = Sequence(request, list(TOKENS), blocks=list(range(10, 0, -1)))
    chunks = [Chunk(one, start, end - start, True) for start, end in itertools.pairwise(CUTS)]
    return torch.cat([torch.from_numpy(runner.logits([chunk])) for chunk in chunks])


@pytest.mark.parametrize("name", [*MODELS, *FOLDERS_ONLY])
def test_native_logits_equal_transformers(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    theirs = their_logits(model, TOKENS)[[end - 1 for end in CUTS[1:]]]
    torch.testing.assert_close(logits_at_cuts(native(tmp_path, "none")), theirs, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "phi3", "qwen2"])
def test_int8_weights_stay_close(tmp_path: Path, name: str) -> None:
    model = make(name)
    model.save_pretrained(tmp_path)
    exact, rounded = logits_at_cuts(native(tmp_path, "none")), logits_at_cuts(native(tmp_path, "int8"))
    assert torch.cosine_similarity(exact, rounded).min() > 0.995
    assert not torch.equal(exact, rounded)


def test_more_experts_than_the_native_router_has_room_for_are_refused(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"num_local_experts": MOST_EXPERTS + 1}))
    with pytest.raises(SettingsError, match="up to 256 experts"):
        native(tmp_path, "none")
