"""The report's rows against the definitions, and its table as a reader gets it."""

from __future__ import annotations

import pytest

from meshlm.worker.quantization.plan import Format
from meshlm.worker.quantization.report import Answers, Row, as_table, format_rows, size_bits
from meshlm.worker.quantization.scoring import ScoredModel, compare, reference
from tests.worker.quantization.tiny_models import texts, tiny_checkpoint


def test_bits_are_weighed_by_size_and_what_is_not_named_is_16() -> None:
    sizes = {"a": 100, "b": 300, "c": 600}
    found = size_bits(sizes, {"a": Format.INT8, "b": Format.INT4_SYMMETRIC})
    assert found == pytest.approx((100 * 8.5 + 300 * 4.5 + 600 * 16) / 1000)


def test_rows_leave_the_model_exact_for_the_next_one() -> None:
    model = ScoredModel(tiny_checkpoint())
    exact, answers = reference(model, texts()), Answers.of(model, texts(), 2)
    assert answers.matched(model) == 64
    formats = {"small": dict.fromkeys(model.matrices, Format.INT4), "dense": {}}
    small, dense = format_rows(model, exact, answers, formats, {}, lambda name: None)
    assert (small.name, small.bits, small.saved) == ("small", 5.0, 1 - 5 / 16)
    assert small.kl is not None
    assert small.kl > 1e-3
    assert (dense.kl, dense.rise) == pytest.approx((0.0, 0.0), abs=1e-6)
    assert (dense.agreement, dense.matched) == (1.0, 64)
    assert compare(model, exact).kl == pytest.approx(0.0, abs=1e-6)


def test_a_table_has_one_line_a_row_and_no_figure_where_none_was_measured() -> None:
    rows = [
        Row("int8", 8.5, 143.0, 0.46875, 25.37, 0.0021, 0.0016, 0.9746, 60.5),
        Row("engine", 9, 150, 0.44, 25.4, 0),
    ]
    head, rule, int8, engine = as_table(rows).splitlines()
    assert [cell.strip() for cell in int8.strip("| ").split("|")] == [
        "int8", "8.50", "143", "-47%", "25.370", "+0.21%", "0.00160", "97.46%", "60.5",
    ]  # fmt: skip
    assert len({len(head), len(rule), len(int8), len(engine)}) == 1
    assert [cell.strip() for cell in engine.split("|")][-4:-1] == ["", "", ""]
