"""The layout's promises: one namespace, typed parts, small imports, complete wheels."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from meshlm.kernels.native import build

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("kernels", "chassis", "router", "worker", "guard", "cache", "mesh", "v1")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def folder_of(part: str) -> Path:
    return {"v1": ROOT / "protos/gen/meshlm/v1", "kernels": ROOT / "kernels/meshlm/kernels"}.get(
        part, ROOT / f"services/{part}/meshlm/{part}"
    )


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_typed_and_none_closes_the_namespace(part: str) -> None:
    folder = folder_of(part)
    assert (folder / "py.typed").is_file()
    assert not (folder.parent / "__init__.py").exists()


def test_every_part_is_packaged_and_can_be_installed_editable(project: dict[str, Any]) -> None:
    build = project["tool"]["hatch"]["build"]
    wanted = {str(folder_of(part).parent.relative_to(ROOT)) for part in PARTS}
    assert set(build["targets"]["wheel"]["packages"]) == wanted
    assert {f"{folder}/meshlm" for folder in build["dev-mode-dirs"]} == wanted
    assert {f"{folder}/meshlm" for folder in project["tool"]["mypy"]["mypy_path"]} == wanted


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=840)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.timeout(900)  # three libraries are compiled: minutes on a busy machine
def test_a_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    tree = set()
    for part in PARTS:
        base = folder_of(part).parents[1]
        tree |= {str(path.relative_to(base)) for path in folder_of(part).rglob("*.py")}
    assert packed == tree


@pytest.mark.timeout(900)
def test_a_wheel_brings_the_native_kernels_and_says_for_which_machine(wheel: Path, tmp_path: Path) -> None:
    try:
        build.find_compiler()
    except build.NoCompilerError as error:
        pytest.skip(str(error))
    libraries = {f"meshlm/kernels/native/{build.library_path(isa).name}" for isa in build.buildable_isas()}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.endswith((".so", "_unbuilt.txt"))} == libraries
        archive.extractall(tmp_path)
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    # The libraries of the unpacked wheel, not of this tree.
    code = "from meshlm.kernels.native import library, build; print(library.open_library().isa, build.FOLDER)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    isa, folder = result.stdout.split()
    assert isa in build.ISAS
    assert folder == str(tmp_path / "meshlm/kernels/native")


def test_an_sdist_can_build_the_native_kernels(project: dict[str, Any]) -> None:
    targets = project["tool"]["hatch"]["build"]["targets"]
    assert {"/hatch_build.py", "/kernels"} <= set(targets["sdist"]["include"])
    assert "custom" in targets["wheel"]["hooks"]
    assert (ROOT / "hatch_build.py").is_file()


def modules_loaded_by(module: str) -> set[str]:
    code = f"import sys, {module}; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module", ["router.main", "guard.main", "cache.main", "mesh.cli", "mesh.client", "worker.main"]
)
def test_only_an_engine_loads_torch(module: str) -> None:
    loaded = modules_loaded_by(f"meshlm.{module}")
    assert not {"torch", "triton", "transformers"} & loaded


@pytest.mark.parametrize("module", ["router.main", "guard.main", "cache.main"])
def test_a_service_loads_no_other_service(module: str) -> None:
    own = module.split(".")[0]
    others = {f"meshlm.{part}" for part in ("router", "worker", "guard", "cache", "mesh", "kernels")} - {
        f"meshlm.{own}"
    }
    assert not others & modules_loaded_by(f"meshlm.{module}")


def test_every_dependency_has_a_bound_and_a_pin(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + [line for name in ("worker", "local") for line in extras[name]]
    pins = {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    for line in wanted:
        name = re.split(r"[<>=!~\[ ]", line)[0]
        assert ">=" in line, line
        assert re.sub(r"[-_.]+", "-", name).lower() in pins, line


def test_no_file_names_this_machine_or_a_registry() -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    pattern = re.compile("/wo" + "rk/|pypi" + r"\.org|registry\.npm" + "js|/ro" + "ot/")
    found = [
        name
        for name in names
        if (ROOT / name).is_file() and pattern.search((ROOT / name).read_bytes().decode("utf-8", "replace"))
    ]
    assert found == []
