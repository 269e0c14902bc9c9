"""The whole way, on a tiny float model: measure, keep, take; and the report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meshlm.worker.loading.opening import open_checkpoint
from meshlm.worker.quantization.cache import plan_for, plans_folder
from meshlm.worker.quantization.main import main
from meshlm.worker.quantization.plan import Format, quantized_matrix
from tests.worker.quantization.tiny_models import CONFIG, write_folder


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_folder(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The tide came in at nine, and by ten the bench was wet. " * 6)
    return path


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["quantize", *map(str, words), "--json"])
    assert main() == 0
    return json.loads(capsys.readouterr().out)


def test_a_worker_takes_the_formats_that_were_measured(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(monkeypatch, capsys, model, "--calibration", text, "--rise", 3)
    assert found["kl"] <= found["bound"]
    plan, checkpoint = plan_for("auto", model), open_checkpoint(model)
    size = stored = 0.0
    for name, wanted in plan.formats.items():
        cols = plan.importance[name].shape[0]
        rows = checkpoint.read(name).shape[0]
        matrix = quantized_matrix(checkpoint, name, rows, cols, plan)
        stored += matrix.nbytes / 2 if wanted is Format.DENSE else matrix.packed_bytes  # float32 counts as fp16
        size += rows * cols
    assert found["bits"] == pytest.approx(8 * stored / size)
    assert sum(sum(kind.values()) for kind in found["matrices"].values()) == 1 + 7 * CONFIG.layers


def test_a_report_has_the_exact_model_first_and_keeps_no_plan(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = told(monkeypatch, capsys, model, "--calibration", text, "--corpus", text, "--tokens", 300)
    exact, int8, symmetric, minimum, auto = found["rows"]
    assert (exact["name"], exact["bits"], exact["kl"]) == ("float32 (reference)", 32.0, pytest.approx(0.0, abs=1e-6))
    assert not found["regrouped"]
    assert int8["kl"] < minimum["kl"] < symmetric["kl"]
    assert (int8["bits"], minimum["bits"], symmetric["bits"]) == (8.5, 5.0, 4.5)
    assert auto["kl"] < minimum["kl"]
    assert not plans_folder().exists()


def test_a_text_too_short_to_measure_on_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    words = ["quantize", str(model), "--calibration", str(tmp_path / "short.txt")]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 1
    assert "9 tokens is too short" in capsys.readouterr().err
