"""`meshlm up`: the mesh on this machine until Ctrl-C, with what happens to it told in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

from meshlm.mesh.launcher import LocalMesh, plan_mesh
from meshlm.mesh.model import fetch
from meshlm.mesh.process import Died, ProcessEvent, Ready, Started, Stopped, last_lines
from meshlm.mesh.settings import add_config_arguments, read_settings
from meshlm.mesh.state import StateFolder
from meshlm.mesh.terminal import open_console, plain_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm up`."""
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`meshlm up`: 0 after a clean drain, 1 where it had to be killed. Raises what keeps the mesh from running."""
    settings, console = read_settings(arguments), open_console()
    folder = settings.folder
    folder.acquire()
    try:
        plan = plan_mesh(settings.source, folder, settings.mesh, config_path=settings.config_path)
        if plan.needs_model:
            fetch(console=console)
        teller = Teller(console, folder)
        mesh = LocalMesh(plan, folder, settings.mesh, tell=teller.tell)
        return asyncio.run(_serve(mesh, teller, console))
    finally:
        folder.release()


async def _serve(mesh: LocalMesh, teller: Teller, console: Console) -> int:
    with _signals() as told:
        return await _serve_until_told(mesh, teller, console, told)


async def _serve_until_told(mesh: LocalMesh, teller: Teller, console: Console, told: _Told) -> int:
    serving = asyncio.create_task(_start_and_wait(mesh, teller, console))
    stopping = asyncio.create_task(told.first.wait())
    killing = asyncio.create_task(_kill_on(told.second, mesh))
    rolling = asyncio.create_task(_roll_on(told.again, mesh))
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if told.first.is_set():
            console.print("draining; once more to kill")
            serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    finally:
        await mesh.stop()
        stopping.cancel()
        killing.cancel()
        rolling.cancel()
    return 1 if told.second.is_set() else 0


async def _start_and_wait(mesh: LocalMesh, teller: Teller, console: Console) -> None:
    await start_with_progress(mesh, teller, console)
    console.print(services_table(mesh))
    console.print(f"[green]ready[/]: try [bold]meshlm chat[/]. Key in {escape(teller.key_file)}; Ctrl-C drains.")
    teller.starting = False
    await mesh.wait()


async def start_with_progress(mesh: LocalMesh, teller: Teller, console: Console) -> None:
    """Start the mesh under a live list of what each service is doing."""
    with Live(teller, console=console, refresh_per_second=8, transient=True):
        await mesh.start()


def services_table(mesh: LocalMesh) -> Table:
    """Where everything is."""
    table = plain_table("service", "address", "admin", "pid")
    for service in mesh.running().services:
        table.add_row(service.name, escape(service.address), service.admin or "-", str(service.pid))
    return table


class Teller:
    """Hears what happens to the processes: a live list while they start, a line for each event afterwards."""

    def __init__(self, console: Console, folder: StateFolder) -> None:
        self.starting = True
        self.key_file = str(folder.key_file)
        self._console = console
        self._folder = folder
        self._states: dict[str, str] = {}
        self._begun: dict[str, float] = {}
        self._spinner = Spinner("dots")

    def tell(self, event: ProcessEvent) -> None:
        """Hear an event."""
        match event:
            case Started(name):
                self._begun[name] = time.monotonic()
                self._states[name] = ""
                self._say(f"{name} starts (pid {event.pid})")
            case Ready(name, seconds):
                self._states[name] = f"[green]serving[/] after {seconds:.1f} s"
                self._say(f"{name} [green]serves[/]")
            case Died(name, why, delay):
                self._states[name] = f"[red]{why}[/]"
                self._console.print(f"[red]{name} died[/] ({why}); it starts again in {delay:g} s")
            case Stopped(name, why, clean):
                self._console.print(f"{name} ended" if clean else f"[red]{name} ended badly[/] ({why})")

    def _say(self, line: str) -> None:
        if not self.starting:
            self._console.print(line)

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, state in self._states.items():
            if state:
                table.add_row(" ", name, state)
            else:
                table.add_row(self._spinner, name, *self._doing(name))
        return table

    def _doing(self, name: str) -> tuple[RenderableType, ...]:
        seconds = time.monotonic() - self._begun[name]
        stage = last_stage(self._folder.log(name))
        text = f"[dim]{escape(stage.name)} ({seconds:.0f} s)[/]"
        return (text, ProgressBar(stage.total, stage.done, width=30)) if stage.total else (text,)


class Stage(NamedTuple):
    """What a starting service is doing; a worker tells how far its engine is."""

    name: str
    done: int = 0
    total: int = 0


def last_stage(log: Path) -> Stage:
    """What a starting service said last, from its log."""
    try:
        record = json.loads(last_lines(log, 1))
    except ValueError:
        return Stage("starting")
    match record:
        case {"stage": str(stage), "done": int(done), "total": int(total)}:
            return Stage(stage.replace("_", " "), done, total)
        case {"event": str(event)}:
            return Stage(event)
        case _:
            return Stage("starting")


class _Told:
    """Whether a signal came, and whether another did."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.again = asyncio.Event()  # start the routers anew

    def hear(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


@contextmanager
def _signals() -> Iterator[_Told]:
    told, loop = _Told(), asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, told.hear)
    loop.add_signal_handler(signal.SIGHUP, told.again.set)
    try:
        yield told
    finally:
        for number in (*numbers, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _kill_on(event: asyncio.Event, mesh: LocalMesh) -> None:
    await event.wait()
    mesh.kill()


async def _roll_on(event: asyncio.Event, mesh: LocalMesh) -> None:
    while True:
        await event.wait()
        event.clear()
        await mesh.roll_routers()
