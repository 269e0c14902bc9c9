"""Each native library in turn."""

from __future__ import annotations

import pytest

from meshlm.kernels.native.library import Library, open_library
from tests.kernels.native.libraries import ISAS


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> Library:
    return open_library(request.param)
