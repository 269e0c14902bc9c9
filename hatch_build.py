"""The wheel's build hook: compiles the native CPU kernels and puts them beside their Python.

Installation never fails for want of a compiler: the wheel is then a pure one, and the torch path serves.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "meshlm/kernels/native"


class NativeKernels(BuildHookInterface[Any]):
    """`pip install .`, `pip install --editable .` and `pip wheel .` all come through here."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """version: "standard" or "editable"; in both the libraries are built in the tree."""
        build = _build_module(Path(self.root) / "kernels" / PACKAGE / "build.py")
        try:
            paths = build.build()
        except build.BuildError as error:
            self.app.display_warning(f"{error}\nThe native CPU kernels are left out: models run in torch, slower.")
            paths = [build.UNBUILT]  # says why, where the kernels are asked for
        else:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"  # called through ctypes, so any Python 3 will do
        if version == "standard":
            build_data["force_include"].update({str(path): f"{PACKAGE}/{path.name}" for path in paths})


def _build_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("meshlm_native_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
