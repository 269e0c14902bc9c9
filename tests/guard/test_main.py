"""What the guard's process is built from."""

from __future__ import annotations

import pytest

from meshlm.chassis.config import ConfigError, Source
from meshlm.guard.config import PolicyConfig
from meshlm.guard.main import build


def test_the_process_is_built_without_any_configuration() -> None:
    _, server, describe = build(Source({}, {}))
    assert server.listen == "127.0.0.1:50071"
    assert describe()["guard"]["max_choices"] == 8


NAMED = {"MESHLM__GUARD__MODEL": "llama-guard-3-8b", "MESHLM__GUARD__LLAMA_GUARD__WORKERS": '["there:1"]'}


async def test_a_named_model_has_scores_of_its_own_where_policies_do_not_say() -> None:
    environ = NAMED | {"MESHLM__GUARD__POLICIES__LAX__HARM_BLOCK_SCORE": "0.8"}
    _, _, describe = build(Source.read(None, environ))
    policies = describe()["guard"]["policies"]
    scores = ("harm_flag_score", "harm_block_score", "answer_flag_score", "answer_confirm_score", "answer_block_score")
    assert [policies["default"][key] for key in scores] == [0.3, 0.5, 0.3, 0.5, 0.9]  # Llama Guard's cards: 0.5
    assert policies["lax"]["harm_block_score"] == 0.8
    assert policies["lax"]["attack_flag_score"] == PolicyConfig().attack_flag_score  # the embedded model judges those
    _, _, describe = build(Source.read(None, {}))
    assert describe()["guard"]["policies"] == {}


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"MESHLM__GUARD__MODEL": "x"}, r"guard\.llama_guard\.workers: required"),
        ({"MESHLM__GUARD__MODEL": ""}, r"guard: model: expected"),
        ({"MESHLM__GUARD__PANEL__SECOND__MODEL": "x"}, r"guard\.llama_guard\.workers: required, for guard\.panel"),
        ({**NAMED, "MESHLM__GUARD__PANEL__SECOND__MODEL": "llama-guard-3-8b"}, r"panel\.second\.model: the model"),
        ({**NAMED, "MESHLM__GUARD__MODEL": "rules", "MESHLM__GUARD__PANEL__SECOND__MODEL": "x"}, r"needs a model"),
        ({**NAMED, "MESHLM__GUARD__LLAMA_GUARD__CATEGORIES": '{T1 = "x"}'}, r"guard\.llama_guard: categories: 'T1'"),
        (
            {**NAMED, "MESHLM__GUARD__LLAMA_GUARD__CATEGORIES": '{S1 = "x"}',
             "MESHLM__GUARD__LLAMA_GUARD__EXCLUDED": '["S1"]'},
            r"guard\.llama_guard\.excluded: no category",
        ),
        ({**NAMED, "MESHLM__GUARD__LLAMA_GUARD__VERSION": "9"}, r"guard\.llama_guard\.version: expected one of 'auto'"),
        ({**NAMED, "MESHLM__GUARD__LLAMA_GUARD__TEMPERATURE": "0.0"}, r"temperature must be above 0"),
        (
            {**NAMED, "MESHLM__GUARD__POLICIES__A__HARM_FLAG_SCORE": "0.6"},
            r"guard\.policies\.a: expected 0 < harm_flag_score.*unset scores are harm_block_score = 0\.5",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_judge_is_told_at_start(environ: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build(Source.read(None, environ))
