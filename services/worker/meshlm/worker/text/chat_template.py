"""Chat messages into the token ids a model was trained on, by the model's own Jinja template.

Control tokens inside a message (a user who writes `<|im_end|>`) must reach the model as plain text. So, before
rendering, a mark is put behind the first character of every control token that a message spells out or leaves
unfinished at its end. The mark is a Unicode noncharacter that occurs in no message. Templates may trim, compare or cut
messages as they like: without control tokens in them, messages are rendered untouched, and the text is encoded in one
piece as everybody encodes it. Where marks were needed, the text is cut at the template's own control tokens, and what
lies between them is encoded, marks removed, with control tokens off.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox

from meshlm.worker.text.tokenizer import Tokenizer

_MARKS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))]  # noncharacters, then private use

Message = Mapping[str, Any]  # "role" and "content"; templates may know more


class ChatTemplateError(Exception):
    """The template refused the messages, or is broken. `refused` tells which: true where the caller can mend it."""

    def __init__(self, reason: str, *, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


class _Refused(jinja2.TemplateError):
    """`raise_exception` was called by the template."""


class ChatTemplate:
    """Immutable and safe to share between threads."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises ChatTemplateError for a template that is no Jinja."""
        self._tokenizer = tokenizer
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        facts = tokenizer.facts
        environment.globals["bos_token"] = "" if facts.bos_id is None else tokenizer.token_text(facts.bos_id)
        environment.globals["eos_token"] = "" if facts.eos_id is None else tokenizer.token_text(facts.eos_id)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template is broken: {error}", refused=False) from None
        controls = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, controls)) or r"(?!)")
        self._spelled = re.compile(_spelled_pattern(controls))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt as text. `variables` are handed to the template (`tools`, `documents`, ...). Raises
        ChatTemplateError.
        """
        try:
            return self._template.render(
                {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )
        except _Refused as error:
            raise ChatTemplateError(str(error), refused=True) from None
        except Exception as error:  # a template is a program, and may fail in any way
            raise ChatTemplateError(f"the chat template failed: {error}", refused=False) from None

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """The prompt as ids; control tokens inside messages and variables stay text. Raises ChatTemplateError."""
        mark = _unused_mark(json.dumps([messages, variables], ensure_ascii=False, default=str))
        marked = _map_text([messages, variables], lambda text: self._spelled.sub(lambda m: m[0] + mark, text))
        text = self.render(marked[0], add_generation_prompt=add_generation_prompt, **marked[1])
        if mark not in text:
            return self._tokenizer.encode(text, parse_control=True)
        ids: list[int] = []
        at = 0
        for match in self._control.finditer(text):
            ids += self._tokenizer.encode(text[at : match.start()].replace(mark, ""))
            ids.append(self._tokenizer.control_tokens[match[0]])
            at = match.end()
        return ids + self._tokenizer.encode(text[at:].replace(mark, ""))


def _spelled_pattern(controls: list[str]) -> str:
    """Matches the first character of a control token, or of a beginning of one that the text ends with,
    spaces aside: templates trim."""
    rests: dict[str, dict[str, None]] = {}
    for token in controls:
        patterns = rests.setdefault(token[0], {})
        patterns[re.escape(token[1:])] = None
        patterns |= dict.fromkeys(re.escape(token[1:cut]) + r"\s*\Z" for cut in range(1, len(token)))
    return "|".join(f"{re.escape(first)}(?={'|'.join(patterns)})" for first, patterns in rests.items()) or r"(?!)"


def _unused_mark(text: str) -> str:
    for mark in _MARKS:
        if mark not in text:
            return mark
    raise ChatTemplateError("the messages hold every character that could mark control tokens", refused=True)


def _map_text(value: Any, change: Any) -> Any:
    """`change` applied to every string inside, keys of mappings left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_text(item, change) for item in value]
    return value


def _refuse(message: str) -> None:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own `tojson` escapes for HTML, which models have never seen."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
