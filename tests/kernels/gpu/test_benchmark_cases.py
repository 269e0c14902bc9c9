"""The benchmark's cases hold together where there is no GPU to time them on: ours and torch's calls at small shapes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
COMPILED = "torch.compile"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`benchmarks/` is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    scripts = {"kernel_cases", "kernels", "tune_kernels", "harness"}
    for name in [name for name in sys.modules if name.partition(".")[0] in scripts]:
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
        ("quantizers", "quantize_work", ("int4 groups of 32", 3, 64)),
        ("quantizers", "dequantize_work", ("int4 groups of 128 with minimum", 3, 128)),
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
        for kind in import_module("kernels").KINDS:
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


@pytest.fixture
def command(case: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`kernels.py` on a device that is made up, with three cases of which the second fails."""
    kernels, measure = import_module("kernels"), import_module("kernel_cases.measure")
    cases = [case.Case(name, lambda: None, case.Goal(of_limit=0.5)) for name in ("one", "broken", "two")]

    def measured(one: object, limits: object, runs: int) -> object:
        if one is cases[1]:
            raise RuntimeError("cannot be launched")
        return measure.Measured(one, 0.02, [1.5e-5], 1e-5, {"torch": [3e-5]}, {"cuDNN": "not built"}, 0.001)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kernels, "correctness", lambda: (True, "99 passed"))
    monkeypatch.setattr(kernels, "ceilings", lambda: measure.Ceilings(3e12, 8e14))
    monkeypatch.setattr(kernels, "measure", measured)
    monkeypatch.setattr(kernels, "import_module", lambda name: SimpleNamespace(cases=lambda plan: cases))
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--kinds", "sampling", "--page", str(tmp_path / "page.md")])
    return kernels


def test_a_case_that_fails_leaves_the_others_and_is_named(command: ModuleType, tmp_path: Path) -> None:
    assert command.main() == 0
    page = (tmp_path / "page.md").read_text()
    assert "Correctness on this device first: 99 passed." in page
    assert "a copy reads and writes 3.00 TB/s, an 8192-cubed product in bf16 makes 800 TFLOP/s" in page
    assert "2 of 2 cases with a goal reach it." in page
    assert "- broken: not measured: RuntimeError: cannot be launched" in page
    assert "- one, cuDNN: not measured: not built" in page


def test_nothing_is_timed_where_the_kernels_are_wrong(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "correctness", lambda: (False, "1 failed"))
    monkeypatch.setattr(command, "ceilings", lambda: pytest.fail("timed"))
    assert command.main() == 1


def test_without_a_device_it_says_so(benchmarks: None, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    for script in ("kernels", "tune_kernels"):
        module = import_module(script)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, "--quick"])
            assert not module.main()
    assert capsys.readouterr().out == "not measured: no CUDA device\nnot tuned: no CUDA device\n"


def test_the_page_is_named_after_device_and_date(benchmarks: None) -> None:
    kernels = import_module("kernels")
    name = kernels.page_file(Path(), "NVIDIA H100 80GB HBM3").name
    assert re.fullmatch(r"kernels_nvidia-h100-80gb-hbm3_\d{8}\.md", name)
    assert kernels.page_file(Path("here.md"), "any") == Path("here.md")
