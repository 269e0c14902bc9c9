"""The waterfall, from stores made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from meshlm.chassis import spans as span_store
from meshlm.chassis.spans import StoredSpan
from meshlm.mesh.cli import run
from meshlm.mesh.trace import NoTraceError, bar_of, find, ordered, waterfall

TRACE = "a" * 32
MS = 1_000_000


def span(
    name: str,
    start: int,
    end: int,
    *,
    parent: str | None = None,
    service: str = "meshlm-router",
    reason: str = "",
    trace: str = TRACE,
) -> StoredSpan:
    """A span whose id is its name; times in milliseconds."""
    attributes = {"error.type": reason} if reason else {}
    return StoredSpan(trace, name, parent, service, name, "internal", start * MS, end * MS, bool(reason), attributes)


REQUEST = [
    span("engine.decode", 40, 100, parent="worker", service="meshlm-worker"),
    span("root", 0, 100, parent="a-span-of-the-caller"),
    span("engine.prefill", 20, 40, parent="worker", service="meshlm-worker"),
    span("cache", 1, 5, parent="root", service="meshlm-cache", reason="DEADLINE"),
    span("worker", 10, 100, parent="root", service="meshlm-worker"),
]


def drawn(spans: list[StoredSpan], width: int = 100) -> list[str]:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(waterfall(spans, width))
    return capture.get().splitlines()


def store_of(path: Path, spans: list[StoredSpan], request_id: str = "req-1") -> str:
    connection = span_store._connect(str(path))
    with connection:
        for stored in spans:
            connection.execute(
                "INSERT OR IGNORE INTO traces (trace_id, request_id) VALUES (?, ?)", (stored.trace_id, request_id)
            )
            connection.execute(
                "INSERT INTO spans VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(stored.trace_id, stored.span_id, stored.parent_id, stored.service, stored.name, stored.kind),
                    *(stored.start_ns, stored.end_ns, int(stored.failed), "{}"),
                ),
            )
    connection.close()
    return str(path)


class TestOrder:
    def test_children_follow_their_parent_by_start(self) -> None:
        assert [(row.span.name, row.depth) for row in ordered(REQUEST)] == [
            ("root", 0),
            ("cache", 1),
            ("worker", 1),
            ("engine.prefill", 2),
            ("engine.decode", 2),
        ]

    def test_a_span_whose_parent_is_not_stored_is_still_shown(self) -> None:
        orphan = span("late", 5, 6, parent="lost")
        assert [(row.span.name, row.depth) for row in ordered([orphan])] == [("late", 0)]


class TestBars:
    @pytest.mark.parametrize(
        ("start", "end", "bar"),
        [
            (0, 100, "██████████"),
            (50, 100, "     █████"),
            (0, 25, "██▌       "),
            (99, 100, "         █"),
        ],
    )
    def test_a_bar_lies_where_its_time_lies(self, start: int, end: int, bar: str) -> None:
        assert bar_of(start, end, 100, 10) == bar

    @pytest.mark.parametrize("at", [0, 500, 1000])
    def test_the_shortest_span_is_visible_and_inside(self, at: int) -> None:
        bar = bar_of(at, at, 1000, 40)
        assert len(bar) == 40
        assert bar.strip()


class TestWaterfall:
    def test_each_span_has_a_line_with_its_service_and_time(self) -> None:
        lines = drawn(REQUEST)
        assert len(lines) == 6
        prefill = next(line for line in lines if "engine.prefill" in line)
        assert prefill.startswith("worker")
        assert prefill.endswith("20.00 ms")

    def test_a_failed_span_tells_its_reason(self) -> None:
        (line,) = [line for line in drawn(REQUEST) if "cache" in line]
        assert "✗ DEADLINE" in line

    def test_what_happens_later_is_drawn_further_right(self) -> None:
        def first_bar(name: str) -> int:
            line = next(line for line in drawn(REQUEST) if name in line)
            return next(i for i, character in enumerate(line) if character in "▏▎▍▌▋▊▉█")

        assert first_bar("root") < first_bar("worker ") < first_bar("engine.prefill") < first_bar("engine.decode")

    @pytest.mark.parametrize("width", [80, 120, 200])
    def test_it_stays_inside_the_terminal(self, width: int) -> None:
        assert max(map(len, drawn(REQUEST, width))) <= width

    def test_a_trace_of_no_duration_can_be_drawn(self) -> None:
        assert len(drawn([span("instant", 3, 3)])) == 2


class TestStore:
    def test_a_trace_is_found_by_request_and_by_trace(self, tmp_path: Path) -> None:
        store = store_of(tmp_path / "spans.db", REQUEST)
        assert (
            {s.name for s in find(store, "req-1")} == {s.name for s in find(store, TRACE)} == {s.name for s in REQUEST}
        )

    def test_an_unknown_id_is_told_as_such(self, tmp_path: Path) -> None:
        with pytest.raises(NoTraceError, match="no trace of nothing"):
            find(store_of(tmp_path / "spans.db", REQUEST), "nothing")

    def test_recent_requests_are_listed_newest_first(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "140")
        store_of(tmp_path / "spans.db", [span("older", 0, 1)], "req-older")
        store_of(tmp_path / "spans.db", [span("newer", 5, 9, trace="b" * 32)], "req-newer")
        assert run(["trace", "--state-dir", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["req-newer", "req-older"]
        assert "4.00 ms" in lines[1]
