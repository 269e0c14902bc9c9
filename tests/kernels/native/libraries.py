"""The native libraries that this machine runs: what their tests are repeated over."""

from __future__ import annotations

import pytest

from meshlm.kernels.native.library import NativeUnavailableError, supported_isas


def _isas() -> tuple[tuple[str, ...], str]:
    try:
        return supported_isas(), ""
    except NativeUnavailableError as error:
        return (), str(error)


ISAS, WHY = _isas()
needs_libraries = pytest.mark.skipif(not ISAS, reason=WHY)
