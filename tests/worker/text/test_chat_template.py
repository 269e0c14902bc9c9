"""Chat prompts: the ids everybody gets for ordinary text, and no control token out of a message."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from meshlm.worker.text.chat_template import _MARKS, ChatTemplate, ChatTemplateError
from meshlm.worker.text.tokenizer import Tokenizer, TokenizerFacts
from meshlm.worker.text.vocabulary import byte_alphabet

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    facts = TokenizerFacts(bos_id=256, eos_id=257, eos_ids=frozenset({257}), adds_bos=False, chat_template=CHATML)
    return Tokenizer(backend, facts)


TOKENIZER = byte_tokenizer()
SNIPPETS = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<", "|>", "a", "\n", " ", "\ufdd0", "🙂"])
CONTENT = st.lists(SNIPPETS, max_size=8).map("".join)


def controls(ids: list[int]) -> int:
    return sum(index in TOKENIZER.control_ids for index in ids)


@given(contents=st.lists(CONTENT, min_size=1, max_size=3))
def test_no_message_can_write_a_control_token_and_none_loses_a_character(contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    template = ChatTemplate(CHATML, TOKENIZER)
    ids = template.encode(messages)
    assert controls(ids) == 2 * len(contents) + 1
    assert TOKENIZER.decode(ids, skip_control=False) == template.render(messages)


def test_messages_that_touch_cannot_build_one_together() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>", TOKENIZER)
    ids = template.encode([{"role": "user", "content": "<|im_"}, {"role": "user", "content": "end|>"}])
    assert controls(ids) == 1
    trimming = ChatTemplate("{% for m in messages %}{{ m.content | trim }}{% endfor %}<|im_end|>", TOKENIZER)
    ids = trimming.encode([{"role": "user", "content": "<|im_ \n"}, {"role": "user", "content": " end|>"}])
    assert controls(ids) == 1


def test_templates_may_trim_and_look_into_a_message() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if '<|im_end|>'[:2] in m.content %}!{% endif %}{{ m.content | trim }}{% endfor %}",
        TOKENIZER,
    )
    ids = template.encode([{"role": "user", "content": "  <|im_end|> x "}])
    assert controls(ids) == 0
    assert TOKENIZER.decode(ids).endswith("<|im_end|> x")


def test_messages_that_leave_no_character_for_a_mark_are_refused() -> None:
    template = ChatTemplate("{{ messages[0].content }}", TOKENIZER)
    with pytest.raises(ChatTemplateError) as caught:
        template.encode([{"role": "user", "content": "".join(_MARKS)}])
    assert caught.value.refused


def test_tool_arguments_and_other_variables_are_guarded_too() -> None:
    template = ChatTemplate("<|im_start|>{{ messages[0].tool_calls | tojson }}{{ tools[0].name }}", TOKENIZER)
    message = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"q": "<|im_end|>"}}]}
    assert controls(template.encode([message], tools=[{"name": "<|im_start|>"}])) == 1


def test_a_template_that_refuses_gives_its_reason_and_says_that_the_caller_can_mend_it() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", TOKENIZER)
    with pytest.raises(ChatTemplateError, match="roles must alternate") as caught:
        template.encode([])
    assert caught.value.refused


@pytest.mark.parametrize("source", ["{{ messages[0].content.absent.deep }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_not_the_callers_fault(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        ChatTemplate(source, TOKENIZER).encode([{"role": "user", "content": "x"}])
    assert not caught.value.refused


def test_a_broken_template_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(ChatTemplateError, match="broken"):
        ChatTemplate("{% for %}", TOKENIZER)


def test_a_template_cannot_reach_into_python() -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", TOKENIZER).render([])


def test_bos_eos_and_the_date_are_there() -> None:
    template = ChatTemplate("{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') | length }}", TOKENIZER)
    assert template.render([]) == "<|im_start|><|im_end|>4"


@pytest.mark.model
@pytest.mark.oracle
def test_ids_equal_transformers_apply_chat_template(smollm2_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = Tokenizer.load(smollm2_path)
    source = ours.facts.chat_template
    assert source is not None
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours._parsing, eos_token="<|im_end|>")
    theirs.chat_template = source
    conversations = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "\n\n 12 + 30 = ? < 50 <"}],
        [{"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "日本語 🙂"), ("user", "a | b |> c"))],
    ]
    for messages in conversations:
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ChatTemplate(source, ours).encode(messages) == list(expected)
