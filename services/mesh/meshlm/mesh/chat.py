"""`meshlm chat`: a conversation in the terminal. Ctrl-C cancels the answer, not the chat."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from meshlm.chassis.errors import MeshError, invalid
from meshlm.mesh.client import Mesh
from meshlm.mesh.requests import Asked, Turn, with_documents
from meshlm.mesh.settings import add_endpoint_arguments, find_endpoint
from meshlm.mesh.told import Told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm chat`."""
    add_endpoint_arguments(parser)
    parser.add_argument("text", nargs="?", help="ask this one thing, and end; without it, a conversation")
    parser.add_argument("--model", default="", help="name or alias (default: the mesh's default model)")
    parser.add_argument("--system", default="", help="the conversation's system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="default: 0, the most likely answer")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (default: 512)")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--kv-window", type=int, metavar="N", help="the worker remembers the first 16 tokens and the latest, N in all"
    )
    kept.add_argument(
        "--kv-importance", type=int, metavar="N", help="the worker remembers the N tokens that mattered most so far"
    )
    parser.add_argument(
        "--document",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a text to read with the first question; the model is to take no orders from it (may be repeated)",
    )
    parser.add_argument("--stats", action="store_true", help="tell time to first token, tokens/s and the request's id")


def run(arguments: argparse.Namespace) -> int:
    """`meshlm chat`."""
    endpoint = find_endpoint(arguments)
    console = Console(highlight=False, soft_wrap=True)
    options = _options(arguments)
    turns: list[Turn] = [("system", arguments.system)] if arguments.system else []
    documents = [_read(path) for path in arguments.document]
    with Mesh(endpoint.target, key=endpoint.key) as mesh:
        if arguments.text is not None:
            answer(mesh, [*turns, _question(arguments.text, documents)], options, console, stats=arguments.stats)
            return 0
        return _converse(mesh, turns, documents, options, console, stats=arguments.stats)


def _options(arguments: argparse.Namespace) -> Asked:
    options = Asked(model=arguments.model, temperature=arguments.temperature, max_tokens=arguments.max_tokens)
    if arguments.seed is not None:
        options["seed"] = arguments.seed
    if arguments.kv_window is not None:
        options["kv"], options["kv_tokens"] = "window", arguments.kv_window
    if arguments.kv_importance is not None:
        options["kv"], options["kv_tokens"] = "importance", arguments.kv_importance
    return options


def _read(path: Path) -> str:
    """A file's text. Raises MeshError REQUEST_INVALID."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid("document", f"{path}: {error.strerror if isinstance(error, OSError) else 'no UTF-8'}") from None


def _question(text: str, documents: Sequence[str]) -> Turn:
    return with_documents(f"{text}\n\n", documents) if documents else ("user", text)


def _converse(
    mesh: Mesh, turns: list[Turn], documents: list[str], options: Asked, console: Console, *, stats: bool
) -> int:
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its history and editing
        console.print("[dim]Ctrl-C cancels an answer; Ctrl-D ends the chat.[/]")
    while (said := _ask(console)) is not None:
        if not said.strip():
            continue
        asked = [*turns, _question(said, documents)]
        try:
            told = answer(mesh, asked, options, console, stats=stats)
        except MeshError as error:
            console.print(f"[red]{escape(str(error))}[/]")
            continue
        if told.text:
            turns[:] = [*asked, ("assistant", told.text)]
            documents = []
    return 0


def _ask(console: Console) -> str | None:
    """The next turn; None at the end of input, or for Ctrl-C where nothing runs."""
    try:
        return input("\nyou> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def answer(mesh: Mesh, turns: Sequence[Turn], options: Asked, console: Console, *, stats: bool = False) -> Told:
    """Stream one answer to the console; Ctrl-C ends it. Raises MeshError."""
    told = Told()
    asked = Asked(**options, messages=turns)
    with contextlib.closing(mesh.stream(**asked)) as events:
        try:
            for event in events:
                console.print(told.hear(event), end="", markup=False)
        except KeyboardInterrupt:
            told.cancel()
    console.print(" [yellow](cancelled)[/]" if told.cancelled else "")
    if stats:
        console.print(f"[dim]{escape(told.summary())}[/]")
    return told
