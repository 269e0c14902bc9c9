"""What every command reads first: the configuration, the state folder, and how to reach the mesh."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from meshlm.chassis.config import PATH_VARIABLE, Source, TelemetryConfig
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.state import MeshNotRunningError, StateFolder

TARGET_VARIABLE = "MESHLM_TARGET"
KEY_VARIABLE = "MESHLM_KEY"
_THIS_MACHINE = ("unix:", "127.0.0.1:", "localhost:", "[::1]:")


@dataclass(frozen=True)
class Settings:
    """The configuration as a command sees it."""

    source: Source
    config_path: Path | None
    mesh: MeshConfig
    folder: StateFolder

    @property
    def span_store(self) -> str:
        """Where the mesh on this machine keeps its spans."""
        return self.source.section("telemetry", TelemetryConfig).span_store or str(self.folder.spans)


@dataclass(frozen=True)
class Endpoint:
    """A router to talk to."""

    target: str
    key: str


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--state-dir`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"mesh.toml (default: ${PATH_VARIABLE}, else none)")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="folder of the mesh on this machine")


def add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """`--target`; the key is never an argument, for everyone on a machine can read those."""
    add_config_arguments(parser)
    parser.add_argument(
        "--target",
        default=os.environ.get(TARGET_VARIABLE, ""),
        metavar="ADDRESS",
        help=f"router, host:port or unix:PATH (default: ${TARGET_VARIABLE}, else the mesh on this machine); "
        f"the key comes from ${KEY_VARIABLE}, else, for a router on this machine, from the state folder",
    )


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Raises ConfigError."""
    path = arguments.config or (Path(named) if (named := os.environ.get(PATH_VARIABLE)) else None)
    source = Source.read(path)
    mesh = source.section("mesh", MeshConfig)
    if arguments.state_dir is not None:
        mesh = dataclasses.replace(mesh, state_dir=arguments.state_dir)
    return Settings(source, path, mesh, StateFolder(mesh.state_dir))


def find_endpoint(arguments: argparse.Namespace) -> Endpoint:
    """The router that the command is to talk to. Raises MeshNotRunningError and ConfigError."""
    key = os.environ.get(KEY_VARIABLE, "")
    if arguments.target and key:
        return Endpoint(arguments.target, key)
    folder = read_settings(arguments).folder
    if arguments.target:
        if not arguments.target.startswith(_THIS_MACHINE):
            raise MeshNotRunningError(
                f"put the key for {arguments.target} into ${KEY_VARIABLE}: the local one stays here"
            )
        return Endpoint(
            arguments.target, folder.key_file.read_text("ascii").strip() if folder.key_file.exists() else ""
        )
    running = folder.running()
    if not key and running.key_file:
        key = Path(running.key_file).read_text("ascii").strip()
    if not key:
        raise MeshNotRunningError(f"the keys of this mesh come from its configuration: put yours into ${KEY_VARIABLE}")
    return Endpoint(running.router, key)
