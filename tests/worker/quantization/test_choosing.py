"""Which plan a worker gets by its setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meshlm.worker.config import default_cache_dir
from meshlm.worker.loading.revision import model_revision
from meshlm.worker.quantization.cache import Measured, keep, plan_for, plans_folder
from meshlm.worker.quantization.plan import AUTO, INT4, INT8, NONE, Format


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"some weights")
    return path


def measured() -> Measured:
    return Measured({"a.weight": Format.INT4}, {"a.weight": torch.ones(32)}, True, 0.01, 0.009, 900, 5.0)


@pytest.mark.parametrize(("setting", "plan"), [("none", NONE), ("int8", INT8), ("int4", INT4), ("auto", AUTO)])
def test_a_model_that_was_not_measured_gets_the_plan_of_its_setting(model: Path, setting: str, plan: object) -> None:
    assert plan_for(setting, model) is plan


def test_auto_takes_the_formats_that_were_measured_and_the_others_only_what_columns_matter(model: Path) -> None:
    keep(plans_folder(), model_revision(model, default_cache_dir()), measured())
    assert plan_for("auto", model).format_of("a.weight") is Format.INT4
    int8 = plan_for("int8", model)
    assert int8.format_of("a.weight") is Format.INT8
    assert torch.equal(int8.importance["a.weight"], torch.ones(32))
    assert plan_for("none", model) is NONE


def test_a_plan_of_other_weights_is_not_taken(model: Path) -> None:
    keep(plans_folder(), model_revision(model, default_cache_dir()), measured())
    model.write_bytes(b"other weights!")
    assert plan_for("auto", model) is AUTO
