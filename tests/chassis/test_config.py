from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from meshlm.chassis.config import ConfigError, ServerConfig, Source, StateConfig, TelemetryConfig, masked


@dataclass(frozen=True)
class Key:
    id: str
    secret_hash: str
    limit: int | None = None


@dataclass(frozen=True)
class Example:
    server: ServerConfig
    model_path: Path
    ratio: float = 0.5
    mode: Literal["a", "b"] = "a"
    keys: tuple[Key, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)


FILE = """
[worker]
model_path = "/m"
ratio = 1
[worker.server]
listen = "127.0.0.1:1"
[[worker.keys]]
id = "k"
secret_hash = "abc"
[worker.aliases]
small = "x"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mesh.toml"
    path.write_text(text)
    return path


def test_a_file_becomes_the_dataclass_it_describes(tmp_path: Path) -> None:
    section = Source.read(write(tmp_path, FILE), {}).section("worker", Example)
    assert section == Example(
        server=ServerConfig(listen="127.0.0.1:1"),
        model_path=Path("/m"),
        ratio=1.0,
        keys=(Key("k", "abc"),),
        aliases={"small": "x"},
    )
    assert isinstance(section.ratio, float)


def test_the_environment_wins_over_the_file_and_is_named_as_the_origin(tmp_path: Path) -> None:
    environ = {
        "MESHLM__WORKER__SERVER__LISTEN": "0.0.0.0:9",
        "MESHLM__WORKER__RATIO": "0.25",
        "MESHLM__WORKER__KEYS": '[{id="e", secret_hash="1", limit=3}]',
        "MESHLM__WORKER__MODE": "b",
    }
    source = Source.read(write(tmp_path, FILE), environ)
    section = source.section("worker", Example)
    assert (section.server.listen, section.ratio, section.mode) == ("0.0.0.0:9", 0.25, "b")
    assert section.keys == (Key("e", "1", 3),)
    assert source.origin("worker.ratio") == "MESHLM__WORKER__RATIO"
    assert source.origin("worker.model_path") == "file"
    assert source.origin("worker.server.grace_seconds") == "default"


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ('[worker]\nmodel_path="/m"\nspeed=1\n[worker.server]\nlisten=""', "worker.speed"),
        ('[worker]\nmodel_path="/m"\nratio="x"\n[worker.server]\nlisten=""', "worker.ratio"),
        ('[worker]\nmodel_path="/m"\nratio=true\n[worker.server]\nlisten=""', "worker.ratio"),
        ('[worker]\nmodel_path="/m"\nmode="c"\n[worker.server]\nlisten=""', "worker.mode"),
        ('[worker]\nmodel_path="/m"\n[worker.server]\nlisten=7', "worker.server.listen"),
        ('[worker]\nmodel_path="/m"\n[worker.server]\nports=7\nlisten=""', "worker.server.ports"),
        ('[worker]\nmodel_path="/m"\n[worker.server]\ngrace_seconds=1', "worker.server.listen"),
        ('[worker]\n[worker.server]\nlisten=""', "worker.model_path"),
        ('[worker]\nmodel_path="/m"\nkeys=[{id="k"}]\n[worker.server]\nlisten=""', "worker.keys[0].secret_hash"),
        ('[worker]\nmodel_path="/m"\naliases={a=1}\n[worker.server]\nlisten=""', "worker.aliases.a"),
    ],
)
def test_a_wrong_key_or_type_is_refused_with_its_full_path(tmp_path: Path, change: str, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Source.read(write(tmp_path, change), {}).section("worker", Example)
    assert str(caught.value).startswith(path)


def test_an_unknown_section_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wroker"):
        Source.read(write(tmp_path, "[wroker]\nx=1"), {})
    with pytest.raises(ConfigError, match="wroker"):
        Source.read(None, {"MESHLM__WROKER__X": "1"})


def test_an_override_that_is_no_value_of_its_type_names_the_variable() -> None:
    environ = {"MESHLM__TELEMETRY__SAMPLE_RATIO": "lots"}
    with pytest.raises(ConfigError, match="MESHLM__TELEMETRY__SAMPLE_RATIO"):
        Source.read(None, environ).section("telemetry", TelemetryConfig)


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="sample_ratio"):
        Source.read(None, {"MESHLM__TELEMETRY__SAMPLE_RATIO": "2"}).section("telemetry", TelemetryConfig)


def test_display_hides_hashes_and_passwords_in_urls() -> None:
    shown = masked(Example(server=ServerConfig(listen="x"), model_path=Path("/m"), keys=(Key("k", "topsecret"),)))
    assert shown["keys"][0] == {"id": "k", "secret_hash": "***", "limit": None}
    assert masked(StateConfig(redis_url="redis://u:pw@h:1/0"))["redis_url"] == "redis://***@h:1/0"
    assert masked(StateConfig(redis_url="unix://u:p@/s?password=pw"))["redis_url"] == "unix://***@/s?***"
    assert masked(StateConfig(redis_url="redis://u:p?w@h"))["redis_url"] == "redis://***@?***"
    assert masked(StateConfig(redis_url="unix:///s"))["redis_url"] == "unix:///s"


def test_a_missing_file_is_an_error_and_not_an_empty_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Source.read(tmp_path / "none.toml", {})
