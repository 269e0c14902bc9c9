"""The `meshlm` command. Errors are one line and exit code 1; wrong usage is exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from meshlm.chassis.config import ConfigError
from meshlm.chassis.errors import MeshError
from meshlm.mesh.launcher import AddressTaken, GaveUp, NotReady
from meshlm.mesh.model import FetchError
from meshlm.mesh.state import MeshNotRunningError, StateFolderError
from meshlm.mesh.trace import NoTraceError


class Command(NamedTuple):
    """A command: its functions `add_arguments` and `run` are in its module, under names that begin with `prefix`."""

    name: str
    help: str
    module: str
    arguments: str = "add_arguments"
    run: str = "run"


COMMANDS = (
    Command("up", "run the mesh on this machine until Ctrl-C", "up"),
    Command("chat", "talk to a model", "chat"),
    Command("models", "what the mesh serves", "status", "add_models_arguments", "run_models"),
    Command("status", "how each service is", "status"),
    Command("trace", "one request as a waterfall, or the recent ones", "trace"),
    Command("quarantine", "workers that were proven wrong, and their release", "quarantine"),
    Command("route", "what would happen to a request, and why, without running it", "route"),
    Command("config", "the configuration in force, and where it came from", "show"),
    Command("key", "make keys for callers", "keys"),
    Command("guard", "judge a text as the guard does, and say why", "guard_check"),
    Command("model", "fetch the model that demo and tests run on", "model"),
    Command("quantize", "measure how small a model's weights may be, and how good it is then", "quantize"),
    Command("demo", "see it all in a minute, on a mesh of its own", "demo"),
)

# What is foreseen, and tells its reason by itself.
_FORESEEN = (
    AddressTaken,
    ConfigError,
    FetchError,
    GaveUp,
    MeshError,
    MeshNotRunningError,
    NoTraceError,
    NotReady,
    StateFolderError,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `meshlm` script."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parsed = _parser(words).parse_args(words)
    execute: Callable[[argparse.Namespace], int] = parsed.execute
    try:
        return execute(parsed)
    except _FORESEEN as error:
        sys.stderr.write(f"meshlm {parsed.command}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `meshlm trace | head`
        sys.stderr.close()
        return 1


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="meshlm", description="An LLM inference mesh on this machine or elsewhere.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        if command.name in words:  # the others need not be imported
            module = import_module(f"meshlm.mesh.{command.module}")
            getattr(module, command.arguments)(sub)
            sub.set_defaults(execute=getattr(module, command.run))
    return parser


if __name__ == "__main__":
    main()
