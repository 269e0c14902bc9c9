"""Calls of tools leave only complete and allowed, in every form, however the answer comes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.guard.tool_calls import ARGUMENTS, MALFORMED, UNKNOWN, ToolRules, ToolWatch
from meshlm.guard.tool_schemas import ToolSchema

WEATHER = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}},
        "required": ["city"],
        "additionalProperties": False,
    }
)
MOST = 400
RULES = ToolRules.of({"weather": WEATHER, "now": "{}"}, MOST)
GOOD = '{"name": "weather", "arguments": {"city": "Ulm"}}'
BAD = '{"name": "rm", "arguments": {"path": "/"}}'
WRONG = '{"name": "weather", "arguments": {"town": "Ulm"}}'


def watched(text: str, cuts: list[int] | None = None) -> ToolWatch:
    watch, at = ToolWatch(RULES), 0
    for cut in [*sorted(cuts or []), len(text)]:
        if watch.feed(text[at:cut]):
            return watch
        at = max(at, cut)
    watch.feed("", last=True)
    return watch


def reason(text: str) -> str:
    found = watched(text).found
    return "" if found is None else found.category


FORMS = {
    "hermes": "<tool_call>\nCALL\n</tool_call>",
    "hermes, not closed": "<tool_call>CALL",
    "llama": "<|python_tag|>CALL",
    "mistral": "[TOOL_CALLS] [CALL]",
    "bare": "CALL",
    "in prose": "I will call this: CALL and tell you.",
    "in a block": "```json\nCALL\n```",
    "in an envelope": '{"type": "function", "function": CALL}',
    "in a list": '{"tool_calls": [CALL]}',
    "behind an object": '{"a": 1} CALL',
    "behind braces that are none": "f() { } CALL",
}


def form(name: str, call: str) -> str:
    return FORMS[name].replace("CALL", call)


@pytest.mark.parametrize("name", FORMS)
def test_a_call_is_judged_in_every_form(name: str) -> None:
    assert reason(form(name, GOOD)) == ""
    assert reason(form(name, BAD)) == UNKNOWN
    assert reason(form(name, WRONG)) == ARGUMENTS
    assert reason(form(name, GOOD.replace("arguments", "parameters"))) == ""


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("call", [GOOD, BAD, WRONG])
def test_the_verdict_does_not_depend_on_how_the_text_comes(name: str, call: str) -> None:
    text = f"Well. {form(name, call)}"
    whole, letters = watched(text), watched(text, list(range(len(text))))
    assert (whole.found, whole.decided_at, whole.clear) == (letters.found, letters.decided_at, letters.clear)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_of_a_refused_call_goes_out(name: str) -> None:
    text = f"Well. {form(name, BAD)} Bye."
    watch = ToolWatch(RULES)
    for char in text:
        if watch.feed(char):
            break
        assert watch.clear <= text.index(BAD)
    else:
        watch.feed("", last=True)
    assert watch.found is not None
    assert watch.clear <= text.index(BAD)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<tool_call>now()</tool_call>", MALFORMED),
        ("<tool_call></tool_call>", MALFORMED),
        ('<tool_call>{"name": "now"}</tool_call>', MALFORMED),
        ('<tool_call>{"name": "now", "arguments": []}</tool_call>', MALFORMED),
        (f"<tool_call>{GOOD}{BAD}</tool_call>", UNKNOWN),
        (f"<tool_call>{GOOD}</tool_call><tool_call>{BAD}</tool_call>", UNKNOWN),
        (f"<tool_call>{GOOD}", ""),
        (f"<tool_call>{GOOD[:-3]}", MALFORMED),
        ('<|python_tag|>brave_search.call(query="x")', MALFORMED),
        (f"<|python_tag|>{GOOD}; {BAD}", UNKNOWN),
        (f"[TOOL_CALLS] [{GOOD}, {BAD}]", UNKNOWN),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}', ""),
        ('[TOOL_CALLS]weather{"city": "Ulm"}now{}', ""),
        ('[TOOL_CALLS]weather{"city": 5}', ARGUMENTS),
        ('[TOOL_CALLS]rm[CALL_ID]a1[ARGS]{"city": "Ulm"}', UNKNOWN),
        # What two readers may read differently is refused.
        ('{"name": "now", "name": "rm", "arguments": {}}', MALFORMED),
        ('{"name": "now", "arguments": {}, "parameters": {"x": 1}}', MALFORMED),
        ('{"name": "now", "arguments": {"x": NaN}}', MALFORMED),
        ('{"n\\u0061me": "rm", "arguments": {}}', UNKNOWN),
        ('{"name": "rm", "arguments": {}, }', MALFORMED),
        ('{"name": "rm", "arguments": {"x"', MALFORMED),
        # Arguments as text, as OpenAI's API has them.
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Ulm\\"}"}', ""),
        ('{"name": "weather", "arguments": "{\\"city\\": 5}"}', ARGUMENTS),
        ('{"name": "weather", "arguments": "Ulm"}', MALFORMED),
        # A client looks for marks wherever they stand.
        ('{"a": "<tool_call>{}</tool_call>"}', MALFORMED),
        # In a call's arguments may be what looks like one.
        ('{"name": "now", "arguments": {"name": "rm", "arguments": {}}}', ""),
    ],
)
def test_a_call_that_is_not_one_is_refused_with_its_reason(text: str, expected: str) -> None:
    assert reason(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "The <tool> tag, [TOOLS] and [TOOL_CALL] are none; nor is a < b.",
        'int main() { puts("hi"); } struct { char *name; };',
        '{"name": "Ada", "born": 1815}',
        '{"name": "Ada", "notes": {"name": "x"}}',
        '{"people": [{"name": "Ada"}, {"parameters": 3}]}',
        "{ {not json} { \"a\": 'b' }",
        '{"open": {"and": "never closed',
        "\\frac{a}{b} and {{ template }}",
    ],
)
def test_what_is_no_call_passes(text: str) -> None:
    assert reason(text) == ""


@pytest.mark.parametrize(
    "opening", ["<tool_call>", "<|python_tag|>", "[TOOL_CALLS]", '{"name": "now", "arguments": {"x": "']
)
def test_a_call_that_never_closes_is_malformed_and_takes_bounded_memory(opening: str) -> None:
    watch = ToolWatch(RULES)
    for _ in range(MOST):
        if watch.feed(opening + "x" if watch.clear == 0 and not watch._text else "x"):
            break
        assert len(watch._text) <= MOST
    assert watch.found is not None
    assert watch.found.category == MALFORMED
    assert (watch.clear, watch.decided_at) == (0, MOST)


def test_a_long_answer_in_json_passes_and_a_call_hidden_behind_its_length_does_not() -> None:
    filler = '{"text": "' + "x" * (3 * MOST)
    watch = watched(filler + '", "more": {"name": 1}}', [5, 300, 500])
    assert watch.found is None
    assert len(watch._text) <= MOST
    hidden = filler + '", "name": "rm", "arguments": {"path": "/"}}'
    assert reason(hidden) == MALFORMED
    assert reason(filler + '", "name": "rm", "argu\\u006dents": {}}') == MALFORMED
    assert reason(filler + f'"}} <tool_call>{BAD}</tool_call>') == UNKNOWN
    for size in range(1, 40):  # wherever the length ends
        assert reason('{"t": "' + "x" * (MOST - size) + '", "name": "rm", "arguments": {}}') in (UNKNOWN, MALFORMED)


PIECES = st.sampled_from(
    [
        *("text ", "<tool", "x" * 150, '"name": ', '"arguments": {}', '{"', "[", "]", "{", "}", '"', "\\", '{"a": 1}'),
        *(GOOD, BAD, WRONG, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=10), st.lists(st.integers(0, 900), max_size=8))
def test_any_cut_of_any_text_gives_the_same(pieces: list[str], cuts: list[int]) -> None:
    text = "".join(pieces)
    whole, cut = watched(text), watched(text, [c for c in cuts if c <= len(text)])
    letters = watched(text, list(range(len(text))))
    assert (whole.found, whole.decided_at, whole.clear) == (cut.found, cut.decided_at, cut.clear)
    assert (whole.found, whole.decided_at, whole.clear) == (letters.found, letters.decided_at, letters.clear)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_no_complete_refused_call_is_ever_let_go(pieces: list[str]) -> None:
    text, watch = "".join(pieces), ToolWatch(RULES)
    last = 0
    for char in text:
        if watch.feed(char):
            break
        assert last <= watch.clear
        last = watch.clear
        assert BAD not in text[: watch.clear]
        assert WRONG not in text[: watch.clear]
    assert BAD not in text[: watch.clear]


def test_a_copy_goes_its_own_way() -> None:
    watch = ToolWatch(RULES)
    watch.feed('{"name": ')
    other = copy.copy(watch)
    assert watch.feed('"rm", "arguments": {}}')
    assert not other.feed('"now", "arguments": {}}')


@pytest.mark.parametrize("text", ["{", "[]", '{"type": "strange"}', '{"pattern": "("}', "[" * 100_000])
def test_what_is_no_schema_is_a_mistake(text: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        ToolSchema(text)


def test_a_schema_that_points_elsewhere_fetches_nothing_and_allows_nothing() -> None:
    schema: dict[str, Any] = {"$ref": "http://127.0.0.1:9/schema.json"}
    assert not ToolSchema(json.dumps(schema)).allows({})
