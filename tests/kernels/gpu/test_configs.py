"""Configurations are data by device and shape, and the tuner that makes them keeps what is right and faster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from meshlm.kernels.gpu import configs
from meshlm.kernels.gpu.configs import choose, device_file, trying

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DEFAULT = {"BLOCK": 64, "num_warps": 4}


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    (tmp_path / "tuned").mkdir()
    found = {"product": {"4,128": {"BLOCK": 256}}}
    (tmp_path / "tuned/nvidia_h100_80gb_hbm3.json").write_text(json.dumps(found))
    monkeypatch.setattr(configs.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    configs._tuned_on.cache_clear()
    yield
    configs._tuned_on.cache_clear()


@pytest.mark.usefixtures("tuned")
def test_what_is_tuned_goes_over_the_default_and_what_is_not_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("product", (4, 128), DEFAULT, CUDA) == {"BLOCK": 256, "num_warps": 4}
    assert choose("product", (4, 64), DEFAULT, CUDA) == DEFAULT
    assert choose("norm", (4, 128), DEFAULT, CUDA) == DEFAULT
    assert choose("product", (4, 128), DEFAULT, CPU) == DEFAULT
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA B200")
    assert choose("product", (4, 128), DEFAULT, torch.device("cuda", 1)) == DEFAULT


@pytest.mark.usefixtures("tuned")
def test_a_launch_asks_neither_for_the_devices_name_nor_for_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("product", (4, 128), DEFAULT, CUDA)["BLOCK"] == 256
    for module, name in ((torch.cuda, "get_device_name"), (configs, "device_file"), (configs.resources, "files")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("asked again"))
    assert choose("product", (4, 128), DEFAULT, CUDA)["BLOCK"] == 256
    assert choose("product", (4, 64), DEFAULT, CUDA) == DEFAULT


def test_a_devices_file_is_named_after_it() -> None:
    assert device_file("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3.json"


def test_what_is_tried_goes_over_all_until_the_trial_ends() -> None:
    with trying("product", {"BLOCK": 32}) as trial:
        assert choose("product", (1,), DEFAULT, CPU) == {"BLOCK": 32, "num_warps": 4}
        assert choose("norm", (2,), DEFAULT, CPU) == DEFAULT
    assert trial.asked == {(1,): DEFAULT}
    assert choose("product", (1,), DEFAULT, CPU) == DEFAULT


def test_every_checked_in_file_holds_numbers_by_kernel_and_shape() -> None:
    for path in (Path(configs.__file__).parent / "tuned").glob("*.json"):
        for kernel, shapes in json.loads(path.read_text()).items():
            assert kernel
            for key, config in shapes.items():
                assert [int(part) for part in key.split(",")]
                assert all(isinstance(value, int) for value in config.values())


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("tune_kernels")


def test_the_search_keeps_what_is_faster_and_right(tuner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 512 are the fastest, but wrong; 7 warps cannot be launched."""

    def ours(i: int) -> torch.Tensor:
        config = choose("product", (8,), DEFAULT, CPU)
        if config["num_warps"] == 7:
            raise RuntimeError("no such launch")
        return torch.ones(4) * (2.0 if config["BLOCK"] == 512 else 1.0)

    def timed(call: object, sets: int, runs: int) -> list[float]:
        config = choose("product", (8,), DEFAULT, CPU)
        return [1.0 / config["BLOCK"] + abs(config["num_warps"] - 8) / 1000]

    monkeypatch.setattr(tuner, "timed", timed)
    case = import_module("kernel_cases.case")
    search = tuner.Search("product", case.Work(ours, 1, 1.0), 1)
    assert search.asked == {(8,): DEFAULT}
    space = {"BLOCK": (32, 64, 128, 256, 512), "num_warps": (4, 7, 8)}
    best, fastest, before = search.descend(DEFAULT, space, float("inf"))
    assert best == {"BLOCK": 256, "num_warps": 8}
    assert fastest == pytest.approx(1 / 256)
    assert before == pytest.approx(1 / 64 + 0.004)


@pytest.mark.parametrize("wrong", ["tokens", "logprobs", "both of no number"])
def test_a_result_of_two_parts_is_compared_in_both(tuner: ModuleType, wrong: str) -> None:
    """As a draw gives tokens and log-probabilities: a faster one of other tokens is not taken."""

    def ours(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        tried = choose("draw", (8,), DEFAULT, CPU)["BLOCK"] == 512
        tokens, logprobs = torch.tensor([70_000, 70_000], dtype=torch.int32), torch.tensor([-1.0, -2.0])
        if tried and wrong == "tokens":
            tokens[1] += 1
        elif tried:
            logprobs[1] = -2.5 if wrong == "logprobs" else torch.nan
        return tokens, logprobs

    work = import_module("kernel_cases.case").Work(ours, 1, 1.0)
    search = tuner.Search("draw", work, 1)
    tuner.timed = lambda call, sets, runs: [1.0]
    assert search.seconds(DEFAULT) == 1.0
    assert search.seconds(DEFAULT | {"BLOCK": 512}) == float("inf")


def test_what_is_found_is_written_beside_what_was_known(tuner: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    tuner.write(path, "product", {"4,128": {"BLOCK": 256}})
    tuner.write(path, "norm", {"1": {"num_warps": 2}})
    tuner.write(path, "product", {"8,128": {"BLOCK": 32}})
    wanted = {"norm": {"1": {"num_warps": 2}}, "product": {"4,128": {"BLOCK": 256}, "8,128": {"BLOCK": 32}}}
    assert json.loads(path.read_text()) == wanted
