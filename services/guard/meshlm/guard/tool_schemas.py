"""The arguments that a tool takes, as a JSON schema."""

from __future__ import annotations

import json
from typing import Any

from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable


class ToolSchema:
    """Compiled once."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for what is no schema."""
        try:
            schema = json.loads(text)
            kind: type[Validator] = validator_for(schema, default=Draft202012Validator)
            kind.check_schema(schema)
        except (json.JSONDecodeError, RecursionError):
            raise ValueError("no JSON") from None
        except SchemaError as error:
            raise ValueError(f"no JSON schema: {error.message}") from None
        # An empty registry: references lead nowhere outside, and nothing is ever fetched.
        self._validator = kind(schema, registry=Registry())

    def allows(self, arguments: dict[str, Any]) -> bool:
        """Whether these are arguments of the tool; not, if its schema cannot tell."""
        try:
            self._validator.validate(arguments)
        except (ValidationError, Unresolvable, RecursionError):
            return False
        return True
