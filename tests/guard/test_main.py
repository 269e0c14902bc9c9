"""What the guard's process is built from."""

from __future__ import annotations

from meshlm.chassis.config import Source
from meshlm.guard.main import build


def test_the_process_is_built_without_any_configuration() -> None:
    _, server, describe = build(Source({}, {}))
    assert server.listen == "127.0.0.1:50071"
    assert describe()["guard"]["max_choices"] == 8
