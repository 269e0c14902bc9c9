"""How commands write: one kind of console and one kind of table."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table

# Of a pipe or a file, which have no width of their own: rich would fold at 80.
_PIPE_WIDTH = 160


def open_console() -> Console:
    """Standard output, as wide as it is."""
    folds = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if folds else _PIPE_WIDTH)


def plain_table(*columns: str) -> Table:
    """A table without lines."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
