"""A small local store of recent spans: the embedded default where no collector is configured.

One SQLite file, written by every process of a machine's mesh (WAL mode) from the batch processor's thread, read by
`meshlm trace`.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import format_span_id, format_trace_id

log = structlog.get_logger()

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spans (
    trace_id TEXT NOT NULL, span_id TEXT NOT NULL, parent_id TEXT, service TEXT NOT NULL, name TEXT NOT NULL,
    kind TEXT NOT NULL, start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, failed INTEGER NOT NULL,
    attributes TEXT NOT NULL, PRIMARY KEY (trace_id, span_id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS traces (
    number INTEGER PRIMARY KEY AUTOINCREMENT, trace_id TEXT NOT NULL UNIQUE, request_id TEXT
);
CREATE INDEX IF NOT EXISTS traces_by_request ON traces (request_id);
"""
_REQUEST_ID = "meshlm.request_id"


@dataclass(frozen=True)
class StoredSpan:
    trace_id: str
    span_id: str
    parent_id: str | None
    service: str
    name: str
    kind: str
    start_ns: int  # nanoseconds since the epoch
    end_ns: int
    failed: bool
    attributes: dict[str, Any]


class SpanStore(SpanExporter):
    """Writes spans to the file and drops the oldest traces beyond `keep`."""

    def __init__(self, path: str, *, keep: int) -> None:
        self._path = path
        self._keep = keep
        self._connection: sqlite3.Connection | None = None

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            connection = self._open()
            with connection:
                for span in spans:
                    self._write(connection, span)
                connection.execute(
                    "DELETE FROM spans WHERE trace_id IN (SELECT trace_id FROM traces WHERE number <= "
                    "(SELECT MAX(number) FROM traces) - ?)",
                    (self._keep,),
                )
                connection.execute(
                    "DELETE FROM traces WHERE number <= (SELECT MAX(number) FROM traces) - ?", (self._keep,)
                )
        except sqlite3.Error:
            log.warning("spans lost", path=self._path, spans=len(spans), exc_info=True)
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:  # on the exporting thread, which is the only one to use it
            self._connection = _connect(self._path)
        return self._connection

    @staticmethod
    def _write(connection: sqlite3.Connection, span: ReadableSpan) -> None:
        context = span.get_span_context()
        if context is None or span.start_time is None or span.end_time is None:
            return
        trace_id = format_trace_id(context.trace_id)
        attributes = dict(span.attributes or {})
        connection.execute(
            "INSERT INTO traces (trace_id, request_id) VALUES (?, ?) "
            "ON CONFLICT (trace_id) DO UPDATE SET request_id = COALESCE(request_id, excluded.request_id)",
            (trace_id, attributes.get(_REQUEST_ID)),
        )
        connection.execute(
            "INSERT OR REPLACE INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                trace_id,
                format_span_id(context.span_id),
                format_span_id(span.parent.span_id) if span.parent is not None else None,
                str(span.resource.attributes.get("service.name", "")),
                span.name,
                span.kind.name.lower(),
                span.start_time,
                span.end_time,
                int(not span.status.is_ok),
                json.dumps(attributes, default=str),
            ),
        )


def read_trace(path: str, identifier: str) -> list[StoredSpan]:
    """Spans of a trace, by its id or by a request's id, ordered by start. Empty if there is none."""
    connection = _connect(path)
    try:
        rows = connection.execute(
            "SELECT s.* FROM spans s WHERE s.trace_id = ? OR s.trace_id = "
            "(SELECT trace_id FROM traces WHERE request_id = ? ORDER BY number DESC LIMIT 1) ORDER BY s.start_ns",
            (identifier, identifier),
        ).fetchall()
    finally:
        connection.close()
    return [_stored(row) for row in rows]


def _stored(row: tuple[Any, ...]) -> StoredSpan:
    trace_id, span_id, parent_id, service, name, kind, start_ns, end_ns, failed, attributes = row
    return StoredSpan(
        trace_id, span_id, parent_id, service, name, kind, start_ns, end_ns, bool(failed), json.loads(attributes)
    )


def recent_traces(path: str, limit: int = 20) -> list[tuple[str, str | None]]:
    """Trace and request ids, newest first."""
    connection = _connect(path)
    try:
        return connection.execute(
            "SELECT trace_id, request_id FROM traces ORDER BY number DESC LIMIT ?", (limit,)
        ).fetchall()
    finally:
        connection.close()


def _connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = OFF")
    connection.executescript(_SCHEMA)
    return connection
