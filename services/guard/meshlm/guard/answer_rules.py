"""What a policy looks for in answers beside patterns and models: canaries, and calls of tools."""

from __future__ import annotations

from collections.abc import Sequence

from meshlm.chassis.errors import invalid
from meshlm.guard import canaries, tool_calls
from meshlm.guard.config import Act, PolicyConfig
from meshlm.guard.watches import Watch

_MOST_CANARIES = 4


class AnswerRules:
    """Made once for a policy."""

    def __init__(self, config: PolicyConfig) -> None:
        self._leak: Act = config.action(canaries.CATEGORY, "block")
        self._tool: Act = config.action("tool", "block")
        self._rules: tool_calls.ToolRules | None = None
        if config.tool_calls != "any":
            self._rules = tool_calls.ToolRules.of(config.tools, config.tool_call_chars)

    @property
    def versions(self) -> list[str]:
        """The detectors that read every answer."""
        return [tool_calls.VERSION] if self._rules is not None else []

    def watches(self, tokens: Sequence[str], act: Act) -> list[Watch]:
        """For one answer, those after which `act` follows. Raises MeshError REQUEST_INVALID for what is no canary."""
        made: list[Watch] = []
        if len(tokens) > _MOST_CANARIES or not all(canaries.is_canary(token) for token in tokens):
            raise invalid("start.canaries", f"at most {_MOST_CANARIES}, each of {canaries.DIGITS} hex digits")
        if tokens and self._leak == act:
            made.append(canaries.CanaryWatch(tokens))
        if self._rules is not None and self._tool == act:
            made.append(tool_calls.ToolWatch(self._rules))
        return made
