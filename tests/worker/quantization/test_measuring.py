"""Scoring against log-probabilities worked out plainly, and the choice of formats against trying all of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.kernels.quantize import dequantize, quantize_groups
from meshlm.worker.quantization.cache import Measured, keep, kept, plan_path
from meshlm.worker.quantization.calibration import importance
from meshlm.worker.quantization.measure import Request, measure_plan
from meshlm.worker.quantization.plan import BITS, Format
from meshlm.worker.quantization.regroup import regrouped
from meshlm.worker.quantization.scoring import ScoredModel, compare, matched, reference
from meshlm.worker.quantization.sensitivity import LADDER, Part, Sensitivity, choose, exchange, parts_of
from tests.worker.quantization.tiny_models import CONFIG, texts, tiny_checkpoint


def logits(model: ScoredModel, text: torch.Tensor) -> torch.Tensor:
    return (model.hidden(text) @ model.head.T).double()


def test_a_model_does_not_differ_from_itself() -> None:
    model = ScoredModel(tiny_checkpoint())
    quality = compare(model, reference(model, texts()))
    assert quality.tokens == 78  # 2 texts of 40, of which the first token is not scored
    assert quality.agreement == 1.0
    assert (quality.kl, quality.rise) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_quality_is_what_the_definitions_say() -> None:
    model = ScoredModel(tiny_checkpoint())
    exact = reference(model, texts())
    theirs = [logits(model, text) for text in texts()]
    exchange(model, dict.fromkeys(model.matrices, Format.INT4), {})
    ours = [logits(model, text) for text in texts()]
    quality = compare(model, exact)
    losses, divergences, same = [], [], []
    for text, mine, exacts in zip(texts(), ours, theirs, strict=True):
        for position in range(len(text) - 1):
            p = torch.softmax(exacts[position], -1)
            q = torch.softmax(mine[position], -1)
            losses.append(-float(q[text[position + 1]].log()))
            divergences.append(float((p * (p / q).log()).sum()))
            same.append(float(p.argmax() == q.argmax()))
    count = len(losses)
    assert quality.perplexity == pytest.approx(math.exp(sum(losses) / count), rel=1e-4)
    assert quality.kl == pytest.approx(sum(divergences) / count, rel=1e-3)
    assert quality.agreement == pytest.approx(sum(same) / count)
    assert quality.kl > 1e-3


def test_a_restored_matrix_is_the_files() -> None:
    model, names = (
        ScoredModel(tiny_checkpoint()),
        ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"],
    )
    exact = reference(model, texts())
    exchange(model, dict.fromkeys(names, Format.INT4), {})
    assert compare(model, exact).kl > 1e-4
    model.restore(names)
    assert compare(model, exact).kl == pytest.approx(0.0, abs=1e-6)


def test_generating_goes_on_from_the_cache_as_one_pass_would() -> None:
    model = ScoredModel(tiny_checkpoint())
    prompt = texts(1, 10)[0]
    written = model.generate(prompt, 30)
    assert len(written) == 40
    for end in range(10, 40):
        assert int(logits(model, written[:end])[-1].argmax()) == int(written[end])


def test_a_match_ends_at_the_first_other_token() -> None:
    model = ScoredModel(tiny_checkpoint())
    written = model.generate(texts(1, 10)[0], 30)
    assert matched(model, written, 10) == 30
    written = written.clone()
    written[17] = (written[17] + 1) % CONFIG.vocab_size
    assert matched(model, written, 10) == 7


def test_shuffled_channels_compute_the_same_with_other_groups() -> None:
    plain, shuffled = ScoredModel(tiny_checkpoint()), ScoredModel(regrouped(tiny_checkpoint()))
    for text in texts():
        torch.testing.assert_close(logits(shuffled, text), logits(plain, text), rtol=1e-4, atol=1e-4)
    for name, matrix in plain.matrices.items():
        groups, others = (m.view(m.shape[0], -1, 32).abs().amax(-1) for m in (matrix, shuffled.matrices[name]))
        assert not torch.equal(groups.sort()[0], others.sort()[0]), name


def test_every_matrix_is_seen_with_its_own_input() -> None:
    model = ScoredModel(tiny_checkpoint())
    found = importance(model, texts())
    assert found.keys() == model.matrices.keys()
    assert {name: values.shape[0] for name, values in found.items()} == {
        name: matrix.shape[1] for name, matrix in model.matrices.items()
    }
    hidden = torch.cat([model.hidden(text) for text in texts()])
    torch.testing.assert_close(found["model.embed_tokens.weight"], hidden.square().mean(0), rtol=1e-4, atol=1e-5)
    q, gate = (found[f"model.layers.0.{name}.weight"] for name in ("self_attn.q_proj", "mlp.gate_proj"))
    assert torch.equal(q, found["model.layers.0.self_attn.v_proj.weight"])
    assert not torch.allclose(q, gate)


def test_importance_lowers_the_error_of_what_a_layer_puts_out() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(500, 64, generator=generator) * torch.logspace(-2, 1, 64)
    weight = torch.randn(48, 64, generator=generator)

    def error(salience: torch.Tensor | None) -> float:
        rest = dequantize(quantize_groups(weight, 4, True, salience)) - weight
        return float((x @ rest.T).square().mean())

    assert error(x.square().mean(0)) < 0.75 * error(None)


def test_parts_hold_every_matrix_with_whole_groups_once() -> None:
    shapes = {name: (m.shape[0], m.shape[1]) for name, m in ScoredModel(tiny_checkpoint()).matrices.items()}
    shapes["model.layers.0.mlp.odd.weight"] = (8, 40)
    parts = parts_of(shapes, CONFIG.layers)
    names = [name for part in parts for name in part.names]
    assert sorted(names) == sorted(shapes.keys() - {"model.layers.0.mlp.odd.weight"})
    assert sum(part.weights for part in parts) == sum(shapes[name][0] * shapes[name][1] for name in names)
    labels = {part.label for part in parts}
    assert {"embedding", "down 0-0", "query_key 3-3"} <= labels


costs = st.lists(st.floats(1e-5, 0.02), min_size=3, max_size=3).map(sorted)
measured_parts = st.lists(st.tuples(st.integers(1, 50), costs), min_size=1, max_size=4)


def sensitivities(parts: list[tuple[int, list[float]]]) -> list[Sensitivity]:
    return [
        Sensitivity(
            Part(f"part {index}", (f"m{index}",), weights), {Format.DENSE: 0.0} | dict(zip(LADDER, cost, strict=True))
        )
        for index, (weights, cost) in enumerate(parts)
    ]


@settings(max_examples=60, deadline=None)
@given(parts=measured_parts, bound=st.floats(0.0, 0.05))
def test_the_choice_keeps_the_bound_and_wastes_no_step(parts: list[tuple[int, list[float]]], bound: float) -> None:
    found = sensitivities(parts)
    chosen = choose(found, bound)
    spent = sum(one.costs[chosen[one.part.label]] for one in found)
    assert spent <= bound * (1 + 1e-9)
    for one in found:
        for wanted in LADDER:
            if BITS[wanted] < BITS[chosen[one.part.label]]:
                assert spent - one.costs[chosen[one.part.label]] + one.costs[wanted] > bound * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(parts=measured_parts, bound=st.floats(0.001, 0.05))
def test_the_choice_saves_most_of_what_trying_all_would(parts: list[tuple[int, list[float]]], bound: float) -> None:
    found = sensitivities(parts)

    def bits(formats: tuple[Format, ...]) -> float:
        return sum(BITS[wanted] * one.part.weights for one, wanted in zip(found, formats, strict=True))

    within = [
        formats
        for formats in itertools.product((Format.DENSE, *LADDER), repeat=len(found))
        if sum(one.costs[wanted] for one, wanted in zip(found, formats, strict=True)) <= bound
    ]
    best, dense = min(map(bits, within)), bits((Format.DENSE,) * len(found))
    chosen = choose(found, bound)
    ours = bits(tuple(chosen[one.part.label] for one in found))
    # A greedy choice is at most the largest single item short of the best fractional one.
    largest = max((BITS[Format.DENSE] - BITS[LADDER[-1]]) * one.part.weights for one in found)
    assert dense - ours >= dense - best - largest - 1e-6


def test_a_measured_plan_keeps_its_bound_and_leaves_the_model_as_it_was() -> None:
    model = ScoredModel(tiny_checkpoint())
    exact = reference(model, texts())
    loose, found = measure_plan(model, texts(), Request(rise=0.05), lambda done, total: None)
    tight, _ = measure_plan(model, texts(), Request(rise=0.002), lambda done, total: None)
    assert compare(model, exact).kl == pytest.approx(0.0, abs=1e-6)
    assert (loose.kl, tight.kl) <= (math.log(1.05), math.log(1.002))
    assert loose.bits < tight.bits <= 16.0
    assert loose.formats.keys() == model.matrices.keys() == loose.importance.keys()
    assert len(found) == 1 + 5 * CONFIG.layers


def test_a_kept_plan_comes_back_and_a_damaged_one_is_as_none(tmp_path: Path) -> None:
    measured = Measured({"a.weight": Format.INT4}, {"a.weight": torch.arange(4.0)}, True, 0.01, 0.009, 1024, 5.0)
    assert kept(tmp_path, "r1") is None
    path = keep(tmp_path / "new", "r1", measured)
    found = kept(tmp_path / "new", "r1")
    assert found is not None
    assert (found.formats, found.keep_blocks, found.kl, found.bits) == ({"a.weight": Format.INT4}, True, 0.009, 5.0)
    assert torch.equal(found.plan.importance["a.weight"], torch.arange(4.0))
    assert path == plan_path(tmp_path / "new", "r1")
    path.write_bytes(path.read_bytes()[:-5])
    assert kept(tmp_path / "new", "r1") is None


def test_where_the_file_has_quantized_everything_there_is_nothing_to_measure() -> None:
    plain = tiny_checkpoint()
    blocks = {name: quantize_groups(matrix, 4, True) for name, matrix in ScoredModel(plain).matrices.items()}
    model = ScoredModel(replace(plain, read_quantized=blocks.get))
    told: list[int] = []
    measured, found = measure_plan(model, texts(), Request(), lambda done, total: told.append(done))
    assert (measured.formats, found, told) == ({}, [], [])
    shrunk, _ = measure_plan(model, texts(), Request(shrink=True), lambda done, total: told.append(done))
    assert shrunk.formats.keys() == blocks.keys()
    assert not shrunk.keep_blocks
