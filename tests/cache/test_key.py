"""A key is equal exactly if everything that can change the answer is equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.cache.key import Key, derive
from meshlm.chassis.errors import MeshError
from meshlm.v1 import generation_pb2 as g

Change = Callable[[g.Generation], None]


def generation() -> g.Generation:
    made = g.Generation(model="m", cache_key="c")
    made.input.chat.messages.add(role="user", content="Hello")
    made.sampling.temperature = 0
    made.sampling.logit_bias.update({1: 2.0, 7: -1.0})
    made.sampling.stop.append("\n")
    made.sampling.stop_token_ids.extend([5, 3])
    return made


def key(made: g.Generation, *, tenant: str = "t", revision: str = "r", policy: str = "p") -> str:
    return str(derive(tenant, made, revision, policy))


def changed(change: Change) -> g.Generation:
    made = generation()
    change(made)
    return made


def sampling(**fields: object) -> Change:
    def change(made: g.Generation) -> None:
        for name, value in fields.items():
            setattr(made.sampling, name, value)

    return change


def kv(mode: g.KvPolicy.Mode.ValueType, **fields: int) -> Change:
    return lambda made: made.kv_policy.CopyFrom(g.KvPolicy(mode=mode, **fields))


def message(**fields: str) -> Change:
    return lambda made: made.input.chat.messages[0].MergeFrom(g.Message(**fields))


def parts(*given: tuple[str, bool]) -> Change:
    def change(made: g.Generation) -> None:
        made.input.chat.messages[0].ClearField("content")
        for text, untrusted in given:
            made.input.chat.messages[0].parts.add(text=text, untrusted=untrusted)

    return change


def test_parts_count_by_what_they_say_and_by_whose_words_they_are() -> None:
    plain = key(generation())
    assert key(changed(parts(("Hel", False), ("lo", False)))) == plain
    assert key(changed(parts(("Hel", False), ("lo", True)))) != plain
    assert key(changed(parts(("Hel", False), ("lo", True)))) != key(changed(parts(("Hell", False), ("o", True))))


def test_an_input_that_the_model_reads_otherwise_has_another_key() -> None:
    marked = str(derive("t", generation(), "r", "p", wording="datamark"))
    assert marked != key(generation())


DEFAULTS = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": -0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "n": 1,
}


def explicit(message: Any, defaults: dict[str, Any]) -> None:
    """Say what is meant anyway."""
    for name, value in defaults.items():
        if not message.HasField(name):
            setattr(message, name, value)


RELEVANT: dict[str, Change] = {
    "model": lambda made: setattr(made, "model", "other"),
    "adapter": lambda made: setattr(made, "adapter", "a"),
    "scope": lambda made: setattr(made, "cache_key", ""),
    "ids": lambda made: setattr(made, "return_token_ids", True),
    "role": message(role="tool"),
    "content": message(content="Hello "),
    "name": message(name="Ann"),
    "empty name": message(name=""),
    "another message": lambda made: made.input.chat.messages.extend([g.Message(role="user", content="")]),
    "no generation prompt": lambda made: setattr(made.input.chat, "add_generation_prompt", False),
    "prompt": lambda made: setattr(made.input, "prompt", "Hello"),
    "token ids": lambda made: made.input.token_ids.ids.append(1),
    "temperature": sampling(temperature=0.5),
    "top_p": sampling(top_p=0.5),
    "top_k": sampling(top_k=1),
    "min_p": sampling(min_p=0.5),
    "repetition_penalty": sampling(repetition_penalty=1.5),
    "presence_penalty": sampling(presence_penalty=1.5),
    "frequency_penalty": sampling(frequency_penalty=1.5),
    "seed": sampling(seed=0),
    "max_tokens": sampling(max_tokens=9),
    "min_tokens": sampling(min_tokens=9),
    "ignore_eos": sampling(ignore_eos=True),
    "logprobs": sampling(logprobs=0),
    "n": sampling(n=2),
    "bias": lambda made: made.sampling.logit_bias.update({1: 2.5}),
    "bias of another token": lambda made: made.sampling.logit_bias.update({2: 2.0}),
    "stop": lambda made: made.sampling.stop.append("."),
    "a window": kv(g.KvPolicy.MODE_WINDOW, tokens=64),
    "a larger window": kv(g.KvPolicy.MODE_WINDOW, tokens=128),
    "a window without sinks": kv(g.KvPolicy.MODE_WINDOW, tokens=64, sinks=0),
    "importance": kv(g.KvPolicy.MODE_IMPORTANCE, tokens=64),
    "stop token": lambda made: made.sampling.stop_token_ids.append(9),
}
IRRELEVANT: dict[str, Change] = {
    "priority": lambda made: setattr(made, "priority", g.PRIORITY_BATCH),
    "session": lambda made: setattr(made, "session", "s"),
    "labels": lambda made: made.labels.update({"team": "x"}),
    "cache policy": lambda made: setattr(made, "cache_policy", g.CACHE_POLICY_ALWAYS),
    "explicit defaults": lambda made: explicit(made.sampling, DEFAULTS),
    "an explicitly full KV cache": kv(g.KvPolicy.MODE_FULL),
    "explicit generation prompt": lambda made: explicit(made.input.chat, {"add_generation_prompt": True}),
    "a bias of nothing": lambda made: made.sampling.logit_bias.update({9: 0.0}),
    "the order of stop tokens": lambda made: made.sampling.stop_token_ids.sort(),
    "a stop token twice": lambda made: made.sampling.stop_token_ids.append(3),
}


@pytest.mark.parametrize("name", RELEVANT)
def test_what_can_change_the_answer_changes_the_key(name: str) -> None:
    assert key(changed(RELEVANT[name])) != key(generation())


@pytest.mark.parametrize("name", IRRELEVANT)
def test_what_cannot_change_the_answer_does_not_change_the_key(name: str) -> None:
    assert key(changed(IRRELEVANT[name])) == key(generation())


# Each of these touches something of its own: a set of them is undone by none of the others.
ONE_OF = {"prompt", "token ids", "name", "empty name", "a larger window", "a window without sinks", "importance"}
INDEPENDENT = st.frozensets(st.sampled_from(sorted(RELEVANT.keys() - ONE_OF)))


@given(INDEPENDENT, INDEPENDENT, st.lists(st.sampled_from(sorted(IRRELEVANT.keys() - {"an explicitly full KV cache"}))))
@settings(max_examples=200, deadline=None)
def test_keys_are_equal_exactly_if_the_relevant_fields_are(
    first: frozenset[str], second: frozenset[str], irrelevant: list[str]
) -> None:
    made, other = generation(), generation()
    for name in sorted(first):
        RELEVANT[name](made)
    for name in sorted(second):
        RELEVANT[name](other)
    for name in irrelevant:
        IRRELEVANT[name](other)
    assert (key(made) == key(other)) == (first == second)


def test_every_field_of_a_generation_has_been_thought_of() -> None:
    # A field that is added to the contract must be put into the key, or into the list of those that do not matter.
    assert {field.name for field in g.Generation.DESCRIPTOR.fields} == {
        "model", "adapter", "input", "sampling", "cache_key", "return_token_ids",
        "kv_policy", "priority", "session", "cache_policy", "labels",
    }  # fmt: skip
    assert {field.name for field in g.Sampling.DESCRIPTOR.fields} == {
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
        "logit_bias", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "logprobs", "n",
    }  # fmt: skip
    assert {field.name for field in g.KvPolicy.DESCRIPTOR.fields} == {"mode", "tokens", "sinks"}
    assert {field.name for field in g.Message.DESCRIPTOR.fields} == {"role", "content", "name", "parts"}
    assert {field.name for field in g.Part.DESCRIPTOR.fields} == {"text", "untrusted"}
    assert {field.name for field in g.Chat.DESCRIPTOR.fields} == {"messages", "add_generation_prompt"}


def test_a_windows_default_sinks_are_the_same_as_said_ones() -> None:
    unsaid = changed(kv(g.KvPolicy.MODE_WINDOW, tokens=64))
    assert key(unsaid) == key(changed(kv(g.KvPolicy.MODE_WINDOW, tokens=64, sinks=16)))


def test_tenants_revisions_and_policies_do_not_share_answers() -> None:
    keys = {
        key(generation()),
        key(generation(), tenant="u"),
        key(generation(), revision="s"),
        key(generation(), policy="q"),
    }
    assert len(keys) == 4


@pytest.mark.parametrize("kind", ["prompt", "chat"])
def test_only_a_plain_prompt_is_another_one_where_control_tokens_count(kind: str) -> None:
    made = changed(RELEVANT["prompt"]) if kind == "prompt" else generation()
    plain, raw = (derive("t", made, "r", "p", control_tokens=count) for count in (False, True))
    assert (plain != raw) == (kind == "prompt")


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=100, deadline=None)
def test_text_cannot_move_from_one_field_to_the_next(a: str, b: str, c: str, d: str) -> None:
    def made(role: str, content: str) -> g.Generation:
        return g.Generation(input=g.Input(chat=g.Chat(messages=[g.Message(role=role, content=content)])))

    assert (key(made(a, b)) == key(made(c, d))) == ((a, b) == (c, d))


def test_a_key_survives_the_wire_and_nothing_else_is_one() -> None:
    made = derive("t", generation(), "r", "p")
    assert Key.parse(str(made)) == made
    for text in ("", "a:b", str(made) + "0", str(made).upper(), str(made).replace(":", "}"), "x" * 100_000):
        with pytest.raises(MeshError):
            Key.parse(text)


def test_keys_of_a_tenant_share_a_hash_slot_and_show_no_name() -> None:
    made = derive("acme", generation(), "r", "p")
    tag = made.answer_name[made.answer_name.index("{") : made.answer_name.index("}") + 1]
    assert tag in made.flight_name
    assert "acme" not in made.answer_name


@pytest.mark.parametrize(("tenant", "made"), [("", generation()), ("t", g.Generation())])
def test_a_lookup_without_tenant_or_input_is_refused(tenant: str, made: g.Generation) -> None:
    with pytest.raises(MeshError):
        derive(tenant, made, "r", "p")
