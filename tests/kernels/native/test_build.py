"""How the native kernels are built and which are loaded: no compiler, other sources, no such instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshlm.kernels.native import build
from meshlm.kernels.native.library import (
    SANITIZED_VARIABLE,
    NativeUnavailableError,
    Pool,
    open_library,
    supported_isas,
)

PACKAGE = Path("meshlm/kernels/native")
OPEN = "from meshlm.kernels.native.library import open_library; print(open_library().isa)"


@dataclass(frozen=True)
class Tree:
    """A copy of the native package, first on the path of the processes that are run in it."""

    root: Path

    @property
    def package(self) -> Path:
        return self.root / PACKAGE

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", SANITIZED_VARIABLE)}
        return subprocess.run(
            [sys.executable, *arguments],
            env=inherited | {"PYTHONPATH": str(self.root)} | environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def build(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "meshlm.kernels.native.build", *arguments, **environment)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    kept = shutil.ignore_patterns("_native_*", "_build_*", "__pycache__")
    shutil.copytree(build.FOLDER, tmp_path / PACKAGE, ignore=kept)
    shutil.copy(build.FOLDER.parent / "__init__.py", tmp_path / PACKAGE.parent)
    return Tree(tmp_path)


@pytest.fixture
def built(tree: Tree) -> Tree:
    """The same with libraries, which are this tree's; a skip where there are none."""
    for isa in build.buildable_isas():
        library = build.library_path(isa)
        if build.built_hash(library) != build.sources_hash():
            pytest.skip(f"{library.name} is not built from these sources")
        shutil.copy(library, tree.package)
    return tree


def replace_sources(tree: Tree, text: str) -> None:
    for path in (tree.package / "src").iterdir():
        path.unlink()
    (tree.package / "src/only.cpp").write_text(text)


def test_without_a_compiler_the_build_is_no_failure_and_the_reason_is_told_later(tree: Tree) -> None:
    made = tree.build(PATH="")
    assert made.returncode == 0
    assert "no C++ compiler was found" in made.stdout
    opened = tree.run("-c", OPEN)
    assert opened.returncode == 1
    assert "NativeUnavailableError" in opened.stderr
    assert "no C++ compiler was found" in opened.stderr


def test_a_named_compiler_that_is_not_there_is_named(tree: Tree) -> None:
    assert "CXX names was not found: no-such-compiler" in tree.build(CXX="no-such-compiler -O9").stdout


def test_sources_that_do_not_compile_fail_with_the_compilers_words_and_leave_no_library(tree: Tree) -> None:
    replace_sources(tree, "#error what the author meant")
    made = tree.build("--isa", "generic")
    if "no C++ compiler" in made.stdout:
        pytest.skip(made.stdout)
    assert made.returncode == 1
    assert "what the author meant" in made.stderr
    assert {path.name for path in tree.package.glob("_*") if not path.name.startswith("__")} == {build.UNBUILT.name}


def test_a_failed_build_leaves_the_library_of_before(built: Tree) -> None:
    before = (built.package / "_native_generic.so").read_bytes()
    replace_sources(built, "#error")
    built.build("--isa", "generic")
    assert (built.package / "_native_generic.so").read_bytes() == before


def test_what_matches_its_sources_is_not_compiled_again(built: Tree) -> None:
    made = built.build(CXX="false")
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("change", ["edited", "added"])
def test_a_library_of_other_sources_is_refused_with_what_to_run(built: Tree, change: str) -> None:
    assert built.run("-c", OPEN).returncode == 0
    if change == "edited":
        with (built.package / "src/matrix.h").open("a") as header:
            header.write("// changed\n")
    else:
        (built.package / "src/another.h").write_text("")
    opened = built.run("-c", OPEN)
    assert opened.returncode == 1
    assert "python -m meshlm.kernels.native.build" in opened.stderr


def test_a_file_that_is_no_library_is_not_loaded(built: Tree) -> None:
    for path in built.package.glob("_native_*.so"):
        path.write_bytes(b"not a library")
    assert "NativeUnavailableError" in built.run("-c", OPEN).stderr


def test_sanitized_libraries_are_asked_for_by_the_environment(built: Tree) -> None:
    opened = built.run("-c", OPEN, **{SANITIZED_VARIABLE: "1"})
    assert "_native_generic_sanitized.so is not there" in opened.stderr


def test_neither_building_nor_loading_needs_torch(built: Tree) -> None:
    code = f"{OPEN}; import sys; import meshlm.kernels.native.build; print('torch' in sys.modules)"
    assert built.run("-c", code).stdout.split()[-1] == "False"


def test_the_fastest_library_that_the_cpu_runs_is_taken(built: Tree) -> None:
    assert built.run("-c", OPEN).stdout.strip() == supported_isas()[0]


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="isa must be one of avx512, avx2, generic"):
        open_library("mmx")


@pytest.fixture
def pool() -> Pool:
    try:
        return Pool(open_library(), threads=2)
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def test_a_pool_closes_once_and_is_then_refused(pool: Pool) -> None:
    assert pool.handle
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        _ = pool.handle


@pytest.mark.parametrize(("threads", "spin_us", "named"), [(0, 0, "threads"), (1, -1, "spin_us")])
def test_a_pool_of_no_threads_or_negative_time_is_refused(pool: Pool, threads: int, spin_us: int, named: str) -> None:
    pool.close()
    with pytest.raises(ValueError, match=named):
        Pool(pool.library, threads, spin_us)
