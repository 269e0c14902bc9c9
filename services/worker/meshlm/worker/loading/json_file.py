"""JSON files beside a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meshlm.worker.loading.errors import ModelFileError


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelFileError: missing, or not a JSON object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelFileError(path, error.strerror or str(error)) from None
    except ValueError as error:
        raise ModelFileError(path, f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelFileError(path, "not a JSON object")
    return content
