"""The benchmark's cases hold together where there is no GPU to time them on: ours and torch's calls at small shapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
COMPILED = "torch.compile"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`benchmarks/` is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernel_cases"]:
        del sys.modules[name]


@pytest.fixture
def case(benchmarks: None) -> ModuleType:
    return import_module("kernel_cases.case")


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        ("attention", "decode_work", ("bfloat16", 2, 64, 16)),
        ("attention", "decode_work", ("int4", 2, 32, 16)),
        ("attention", "prefill_work", (2, 32, 32, 16)),
        ("attention", "prefill_work", (1, 16, 48, 16)),
        ("matmul", "product_work", ("int4", 3, (64, 128))),
        ("matmul", "product_work", ("int4", 3, (64, 128), True)),
        ("matmul", "product_work", ("int8", 3, (64, 128))),
        ("matmul", "product_work", ("fp8", 3, (64, 128))),
        ("elementwise", "norm_work", (3, True)),
        ("elementwise", "norm_work", (3, False)),
        ("elementwise", "gated_work", (3, False)),
        ("elementwise", "gated_work", (3, True)),
        ("elementwise", "rope_work", (3,)),
        ("elementwise", "embedding_work", (3,)),
        ("sampling", "sample_work", (2, 1.0, 5, 0.9)),
        ("adapters", "lora_work", (7, 3, 64, 48)),
        ("experts", "mixture_work", ("bf16", 3, 64, 64)),
        ("experts", "mixture_work", ("int4", 3, 64, 128)),
    ],
)
def test_ours_and_torchs_calls_agree(
    kind: str, name: str, arguments: tuple[object, ...], case: ModuleType, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    tiny = case.Model("tiny", 64, 4, 2, 32, 96, 500)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    plan = case.Plan(True, device, memory=1 << 20, cache=1 << 10, dtype=dtype)
    module = import_module(f"kernel_cases.{kind}")
    measure = import_module("kernel_cases.measure")
    if kind == "sampling":
        monkeypatch.setattr(module, "LLAMA_8B", tiny)
    of_model = (tiny,) if kind in ("attention", "elementwise") else ()
    work = getattr(module, name)(plan, *of_model, *arguments)
    assert work.bytes > 0
    assert work.sets >= 1
    work.peers = {name: peer for name, peer in work.peers.items() if name != COMPILED}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    absent: dict[str, str] = {}
    distance = measure.compare(work, absent)
    if work.tolerance is not None:
        assert distance is not None, absent
        assert distance <= work.tolerance
    for i in {0, work.sets - 1}:
        work.ours(i)


def test_the_cases_have_names_of_their_own_and_the_issues_goals(case: ModuleType, device: torch.device) -> None:
    for quick in (True, False):
        plan = case.Plan(quick, device, memory=16 << 30, cache=50 << 20)
        found = {}
        for kind in ("attention", "matmul", "elementwise", "sampling"):
            for one in import_module(f"kernel_cases.{kind}").cases(plan):
                assert one.name not in found
                found[one.name] = str(one.goal)
        assert found["decode attention 8B bf16, 16 x 8192, blocks of 16"] == "at least 85% of the limit"
        assert found["int4 matmul 8B down, 1 rows"] == "at least 75% of the limit, at least 3x bf16 linear"
        assert found["prefill attention 8B, 1 x 4096 of 4096, blocks of 64"] == "at least 0.75x torch's fastest"
        for name in ("rms_norm with residual", "rope and store", "SwiGLU"):
            assert found[f"{name} 8B, 4096 rows"] == "at least 85% of the limit"


def test_a_report_names_what_is_reached_wrong_and_worst(case: ModuleType) -> None:
    report, measure = import_module("kernel_cases.report"), import_module("kernel_cases.measure")

    def measured(name: str, goal: object, ours: float, peer: float, distance: float | None = 0.001) -> object:
        one = case.Case(name, lambda: None, goal)
        return measure.Measured(one, 0.02, [ours], 1e-5, {"torch": [peer]}, {}, distance)

    good = measured("good", case.Goal(of_limit=0.75, times=3.0, peer="torch"), 1.25e-5, 4e-5)
    slow = measured("slow", case.Goal(of_limit=0.8), 2.5e-5, 1e-5)
    slower = measured("slower", case.Goal(times=0.75), 4e-5, 1e-5)
    wrong = measured("wrong", case.Goal(), 1e-5, 1e-5, 0.5)
    text = report.table([good, slow, slower, wrong])
    assert (
        "| good | 12.5 | 0% | 10 | 80% | torch 40 | 3.20 | at least 75% of the limit, at least 3x torch | reached |"
        in text
    )
    assert text.count("**missed**") == 2
    assert text.count("**wrong**") == 1
    assert "1 of 3 cases with a goal reach it. The worst gap: slower, at 33% of its goal" in report.verdict(
        [good, slow, slower]
    )
    rows = report.rows_of([good])
    assert (rows[0].value, rows[0].limit, rows[0].peer_value, rows[0].ratio) == pytest.approx((12.5, 10, 40, 3.2))
