"""The layout's promises: one namespace, typed parts, small imports, complete wheels."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

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


def test_a_wheel_holds_every_module_of_the_tree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    tree = set()
    for part in PARTS:
        base = folder_of(part).parents[1]
        tree |= {str(path.relative_to(base)) for path in folder_of(part).rglob("*.py")}
    assert packed == tree


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
