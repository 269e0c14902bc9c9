"""deploy/mesh.toml: what it says is true, and it says all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, get_type_hints

import pytest

from meshlm.chassis.config import Source
from meshlm.guard.config import PolicyConfig
from meshlm.mesh.config import MeshConfig, WorkerEntry
from meshlm.mesh.show import SERVICES, SHARED
from meshlm.router.config import KeyConfig, PriceConfig, TenantConfig
from meshlm.router.routing.config import ComplexityConfig, RouteConfig, RuleConfig, ShadowConfig, TargetConfig

EXAMPLE = Path(__file__).parents[2] / "deploy" / "mesh.toml"
# Of the router's sections, those that deploy/mesh.toml has only examples of.
ROUTER_KINDS = (
    KeyConfig,
    TenantConfig,
    PriceConfig,
    ComplexityConfig,
    RouteConfig,
    RuleConfig,
    ShadowConfig,
    TargetConfig,
)

pytestmark = pytest.mark.usefixtures("own_machine")


class TestExample:
    """deploy/mesh.toml: what it says must be true."""

    KINDS: ClassVar = {**SERVICES, **SHARED, "mesh": MeshConfig}
    # An engine needs its model; `meshlm up` gives it one.
    MODEL: ClassVar = {"MESHLM__WORKER__MODEL_PATH": "/m.gguf"}

    @pytest.mark.parametrize("section", sorted(KINDS))
    def test_what_it_gives_as_defaults_are_the_defaults(self, section: str) -> None:
        # The launcher chooses addresses where none is given, so that two servers' differ from what the file names.
        built = Source.read(EXAMPLE, self.MODEL).section(section, self.KINDS[section])
        default = Source.read(None, self.MODEL).section(section, self.KINDS[section])
        assert built == default

    @pytest.mark.parametrize("section", sorted(KINDS))
    def test_its_examples_can_be_used(self, section: str, tmp_path: Path) -> None:
        file = tmp_path / "mesh.toml"
        file.write_text(re.sub(r"^#(?=\S)", "", EXAMPLE.read_text(), flags=re.MULTILINE))
        Source.read(file, {}).section(section, self.KINDS[section])

    @pytest.mark.parametrize("section", sorted(KINDS))
    def test_it_names_every_key(self, section: str) -> None:
        told = set(re.findall(r"(?:^#?|[{,] )([a-z_]+) = ", EXAMPLE.read_text(), flags=re.MULTILINE))
        tables = {"keys", "policies", "workers", "tenants", "prices", "model_limits", "ramps", "routes", "rules",
                  "complexity"}  # fmt: skip
        below = {"router": ROUTER_KINDS, "guard": (PolicyConfig,), "mesh": (WorkerEntry,)}
        kinds = [self.KINDS[section], *below.get(section, ())]
        assert {name for kind in kinds for name in _keys(kind)} - tables <= told


def _keys(kind: type) -> Iterator[str]:
    """Names of a dataclass's fields, and of those of the dataclasses in it."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(inner := hints[field.name]):
            yield from _keys(inner)
        else:
            yield field.name
