"""Poisoned memory: what a kernel allocates and forgets to write is NaN, and fails the comparison."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, see torch.utils.deterministic
    yield
    torch.use_deterministic_algorithms(False)
