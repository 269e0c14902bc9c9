"""`meshlm trace`: one request's spans as a waterfall in the terminal, or the recent requests."""

from __future__ import annotations

import argparse
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from meshlm.chassis.spans import StoredSpan, read_trace, recent_traces
from meshlm.chassis.telemetry import Name
from meshlm.mesh.settings import add_config_arguments, read_settings
from meshlm.mesh.terminal import open_console, plain_table

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green")
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LONGEST_NAME = 44
_SHORTEST_BAR = 16


class NoTraceError(Exception):
    """There is no such trace; the text says where it was looked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm trace`."""
    add_config_arguments(parser)
    parser.add_argument("id", nargs="?", help="id of a request or a trace; without it, the recent ones are listed")


def run(arguments: argparse.Namespace) -> int:
    """`meshlm trace`."""
    store = read_settings(arguments).span_store
    if not Path(store).exists():
        raise NoTraceError(f"no spans in {store}: has a mesh run here?")
    console = open_console()
    try:
        console.print(waterfall(find(store, arguments.id), console.width) if arguments.id else recent(store))
    except sqlite3.Error as error:
        raise NoTraceError(f"{store}: {error}") from None
    return 0


def find(store: str, identifier: str) -> list[StoredSpan]:
    """A trace's spans, by its id or a request's. Raises NoTraceError."""
    spans = read_trace(store, identifier)
    if not spans:
        raise NoTraceError(f"no trace of {identifier} in {store}; it keeps recent ones only")
    return spans


@dataclass(frozen=True)
class Row:
    """A span in its place."""

    span: StoredSpan
    depth: int


def ordered(spans: Sequence[StoredSpan]) -> Iterator[Row]:
    """Parents before children, siblings by start; a span whose parent is elsewhere is a root."""
    known = {span.span_id for span in spans}
    children: dict[str | None, list[StoredSpan]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.end_ns)):
        children[span.parent_id if span.parent_id in known else None].append(span)
    waiting = [Row(span, 0) for span in reversed(children[None])]
    while waiting:
        row = waiting.pop()
        yield row
        waiting += [Row(span, row.depth + 1) for span in reversed(children[row.span.span_id])]


def waterfall(spans: Sequence[StoredSpan], width: int) -> Table:
    """The spans of one trace on one time axis; failed ones are red and say why."""
    rows = list(ordered(spans))
    start = min(span.start_ns for span in spans)
    total = max(max(span.end_ns for span in spans) - start, 1)
    services = sorted({span.service for span in spans})
    colours = {service: _COLOURS[i % len(_COLOURS)] for i, service in enumerate(services)}
    labels = [_label(row) for row in rows]
    service_width = max(len(_short(service)) for service in services)
    bar = max(_SHORTEST_BAR, width - service_width - max(map(len, labels)) - 10 - 6)
    table = Table(box=None, pad_edge=False, header_style="dim", show_edge=False)
    table.add_column("service", no_wrap=True)
    table.add_column("span", no_wrap=True)
    table.add_column(_axis(bar, total), no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    for row, label in zip(rows, labels, strict=True):
        span, colour = row.span, "red" if row.span.failed else colours[row.span.service]
        text = Text(bar_of(span.start_ns - start, span.end_ns - start, total, bar), style=colour)
        took = Text(_time(span.end_ns - span.start_ns), style="red" if span.failed else "")
        name = Text(label, style="red" if span.failed else "")
        table.add_row(Text(_short(span.service), style=colours[span.service]), name, text, took)
    return table


def bar_of(start: int, end: int, total: int, width: int) -> str:
    """A bar of eighths of a character from `start` to `end` on an axis of `total`; never invisible."""
    first = min(round(start * width * 8 / total), width * 8 - 1)
    last = max(round(end * width * 8 / total), first + 1)
    # Only the end of a bar can be a part of a character: what follows the cell's left edge.
    cells, eighths = divmod(last - first // 8 * 8, 8)
    bar = " " * (first // 8) + "█" * cells + (_EIGHTHS[eighths] if eighths else "")
    return bar[:width].ljust(width)


def recent(store: str, limit: int = 20) -> Table:
    """The recent requests, newest first."""
    table = plain_table("request", "trace", "at", "took", "what", "")
    for trace_id, request_id in recent_traces(store, limit):
        spans = read_trace(store, trace_id)
        if not spans:
            continue
        start, end = min(span.start_ns for span in spans), max(span.end_ns for span in spans)
        at = datetime.fromtimestamp(start / 1e9).astimezone().strftime("%H:%M:%S")
        reason = next((str(span.attributes.get(Name.ERROR_REASON, "failed")) for span in spans if span.failed), "")
        what = next(ordered(spans)).span.name.rpartition("/")[2]
        table.add_row(
            escape(request_id or "-"), trace_id, at, _time(end - start), escape(what), f"[red]{escape(reason)}[/]"
        )
    return table


def _label(row: Row) -> str:
    name = row.span.name.rpartition("/")[2] or row.span.name
    if row.span.failed:
        name += f" ✗ {row.span.attributes.get(Name.ERROR_REASON, 'failed')}"
    text = "  " * row.depth + name
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def _short(service: str) -> str:
    return service.removeprefix("meshlm-") or "?"


def _axis(width: int, total: int) -> Text:
    end = _time(total)
    middle = _time(total // 2)
    left = "0".ljust(width // 2 - len(middle) // 2) + middle
    return Text(left.ljust(width - len(end)) + end)


def _time(nanoseconds: int) -> str:
    milliseconds = nanoseconds / 1e6
    if milliseconds >= 10_000:
        return f"{milliseconds / 1000:.1f} s"
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.2f} ms"
