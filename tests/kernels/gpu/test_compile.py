"""The offline compiler: what it says of kernels that are fit to serve, and of those that are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshlm.kernels.gpu import compile as compiler
from meshlm.kernels.gpu.capabilities import shared_limit
from meshlm.kernels.gpu.variants import ARCHITECTURES, FP8_ARCHITECTURES, Variant

UNFIT = """
import triton
import triton.language as tl
from meshlm.kernels.gpu.variants import Variant


@triton.jit
def product(a, b, out, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    sums = tl.zeros([SIZE, SIZE], tl.float32)
    for first in tl.range(0, n, 64, num_stages=4):
        k = first + tl.arange(0, 64)
        sums = tl.dot(tl.load(a + at[:, None] * n + k[None, :]), tl.load(b + k[:, None] * SIZE + at[None, :]), sums)
    tl.store(out + at[:, None] * SIZE + at[None, :], sums)


@triton.jit
def nonsense(a):
    tl.store(a, tl.arange(0, 3))


def variants():
    types = {"a": "*bf16:16", "b": "*bf16:16", "out": "*fp32:16", "n": "i32:16"}
    yield Variant("fit", product, types, {"SIZE": 64}, {"num_warps": 4})
    yield Variant("spills", product, types, {"SIZE": 128}, {"num_warps": 1})
    yield Variant("spills, not hot", product, types, {"SIZE": 128}, {"num_warps": 1}, hot=False)
    yield Variant("too large", product, types, {"SIZE": 256}, {"num_warps": 8})
    yield Variant("does not compile", nonsense, types)
"""
ASK = """
import dataclasses, json
from meshlm.kernels.gpu.compile import Job, compile_variant, variants_of
print(json.dumps({name: dataclasses.asdict(compile_variant(Job("unfit", name, ARCHITECTURE)))
                  for name in variants_of("unfit") if name in NAMES}))
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may interpret."""
    kernels = Path(compiler.__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{folder}:{kernels}", "TRITON_CACHE_DIR": str(folder / "cache")}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=850)


def test_what_is_unfit_is_said_and_why(tmp_path: Path) -> None:
    (tmp_path / "unfit.py").write_text(UNFIT)
    found = {}
    for architecture, names in ((90, ["fit", "spills", "spills, not hot", "does not compile"]), (80, ["too large"])):
        ask = ASK.replace("ARCHITECTURE", str(architecture)).replace("NAMES", repr(names))
        answer = run(tmp_path, "-c", ask)
        assert answer.returncode == 0, answer.stderr
        found |= json.loads(answer.stdout)
    assert found["fit"]["problem"] == ""
    assert found["fit"]["instructions"] == ["wgmma", "cp.async"]
    assert 32 <= found["fit"]["registers"] <= 255
    assert found["fit"]["shared"] >= 4 * 2 * 64 * 64
    assert found["spills"]["problem"].startswith("spills registers")
    assert found["spills, not hot"]["problem"] == ""
    assert found["spills, not hot"]["spills"] == found["spills"]["spills"] > 0
    assert "a block has 166912" in found["too large"]["problem"]
    assert "arange" in found["does not compile"]["problem"]


def test_the_command_compiles_what_is_asked_for(tmp_path: Path) -> None:
    answer = run(tmp_path, "-m", compiler.__name__, "--match", "sample count", "--architectures", "80", "100")
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert [line.split()[:4] for line in lines[1:-1]] == [
        ["sample", "count", "output", "80"],
        ["sample", "count", "output", "100"],
        ["sample", "count", "prompt", "80"],
        ["sample", "count", "prompt", "100"],
    ]
    assert lines[-1].endswith("0 with problems")


APART = """
import json, re
from meshlm.kernels.gpu import compile as compiler
found = {}
for variant in compiler.variants_of("meshlm.kernels.gpu.matmul_variants").values():
    for architecture in variant.architectures if variant.name.startswith("quant_matmul fp8, 2048 rows") else ():
        ptx = compiler._compile(variant, architecture).asm["ptx"]
        sums = variant.constants["BM"] * variant.constants["BN"] // (32 * variant.options["num_warps"])  # of a thread
        found[architecture] = len(re.findall(r"add(?:\\.rn)?\\.f32", ptx)), sums
print(json.dumps(found))
"""


def test_sums_of_fp8_leave_the_tensor_cores_at_every_step_where_those_keep_few_bits(tmp_path: Path) -> None:
    """Each sum of a thread is added to in float32 on Ada, Hopper and 12.x; on 10.x none is: there they are exact."""
    answer = run(tmp_path, "-c", APART)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert set(found) == {"89", "90", "100", "120"}
    for architecture, (additions, sums) in found.items():
        least = 0 if architecture == "100" else sums // 2  # 12.x adds two at once
        assert additions >= least > 0 or additions == least == 0, architecture


def test_every_family_is_compiled_in_what_it_is_served_in() -> None:
    """Dense products aside, each operation that is served on one architecture is on all, fp8 from Ada on."""
    served: dict[str, set[int]] = {}
    for module in compiler.modules():
        for variant in compiler.variants_of(module).values():
            served.setdefault(variant.name.partition("/sm_")[0], set()).update(variant.architectures)
    for name, architectures in served.items():
        if "hopper" not in name:
            assert architectures == set(FP8_ARCHITECTURES if "fp8" in name else ARCHITECTURES), name
    assert served["prefill_attention_hopper/llama-3-8b/bfloat16"] == {90, 100}


def test_a_capability_that_nobody_listed_gets_the_least_memory_that_there_is() -> None:
    assert shared_limit(90) == 227 << 10
    assert shared_limit(89) == shared_limit(121) == 99 << 10


def test_nothing_to_compile_is_not_success(tmp_path: Path) -> None:
    assert run(tmp_path, "-m", compiler.__name__, "--match", "no such kernel").returncode == 2


def test_two_variants_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = Variant("same", kernel=None, types={})
    monkeypatch.setattr("meshlm.kernels.gpu.sample.variants", lambda: [twice, twice])
    compiler.variants_of.cache_clear()
    with pytest.raises(ValueError, match="two variants named 'same'"):
        compiler.variants_of("meshlm.kernels.gpu.sample")
    compiler.variants_of.cache_clear()


def test_every_variant_gives_each_parameter_a_type_or_a_constant() -> None:
    """Without compiling: names that a kernel has not would only show there."""
    for module in compiler.modules():
        for variant in compiler.variants_of(module).values():
            names = set(variant.kernel.arg_names)
            assert names <= set(variant.types) | set(variant.constants), variant.name
            assert set(variant.constants) <= names, variant.name
            assert set(variant.architectures) <= set(compiler.SHARED_LIMIT), variant.name
