"""The same tests on a CUDA device and, where there is none, under Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
if CUDA:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses products, see below
else:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


class _WithoutTriton(pytest.File):
    def collect(self) -> Any:
        pytest.skip("triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return None if find_spec("triton") else _WithoutTriton.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip("needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tensors of these tests live."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(scope="session")
def dtypes() -> tuple[torch.dtype, ...]:
    """Types of activations that a kernel is tested in. The interpreter has no right product of bfloat16."""
    return (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is NaN, or the largest integer: what a kernel forgets to write fails the comparison."""
    torch.use_deterministic_algorithms(True, warn_only=CUDA)
    yield
    torch.use_deterministic_algorithms(False)
