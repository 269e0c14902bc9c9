"""Calls of tools in answers: which are allowed, enforced before they leave. The mesh itself runs no tool.

Forms that are known, as models write them and clients read them: `<tool_call>{...}</tool_call>` (Hermes, Qwen),
`<|python_tag|>` and then JSON (Llama 3), `[TOOL_CALLS]` and then a list or `name{...}` (Mistral), and, since the marks
may be control tokens that no text shows, a bare JSON object with a name and arguments or parameters anywhere. Text is
held from where a call may begin until it is complete and allowed. The verdict follows from the text alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from meshlm.guard.findings import Finding
from meshlm.guard.tool_schemas import ToolSchema

VERSION = "tool_calls/1"
UNKNOWN, MALFORMED, ARGUMENTS = "tool.unknown", "tool.malformed", "tool.arguments"

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON, _MISTRAL = "<|python_tag|>", "[TOOL_CALLS]"
_MARKS = (_OPEN, _PYTHON, _MISTRAL)
_MARK = re.compile("|".join(map(re.escape, _MARKS)))
_START = re.compile(rf"{_MARK.pattern}|\{{")
_NAME = re.compile(r'"name"\s*:')
_TAKES = re.compile(r'"(?:arguments|parameters)"\s*:')
# A key may be spelled with escapes, and read as `name` all the same.
_SPELLED = re.compile(r'"[^"\\]{0,8}\\u[^"]{0,80}"\s{0,100}:')
_LATE = re.compile(r'"(?:arguments|parameters)"')
_NO_OBJECT = re.compile(r'\{\s*[^\s"]')
_MISTRAL_CALL = re.compile(r"\s*([\w.-]{1,128})(?:\[CALL_ID\]\w{1,64})?(?:\[ARGS\])?\s*(?=\{)")
_CONTEXT = 256  # characters that stay in sight where nothing is held: the longest key, and spaces


class _RefusedError(Exception):
    """A call that may not leave; `args[0]` is the category."""


class _NoJsonError(Exception):
    """Not JSON, or JSON that two readers may read differently."""


@dataclass(frozen=True)
class ToolRules:
    """Which calls are allowed."""

    # Tools that may be called, with what they take.
    tools: Mapping[str, ToolSchema]
    # Longest call, characters.
    most_chars: int

    @classmethod
    def of(cls, schemas: Mapping[str, str], most_chars: int) -> ToolRules:
        """`schemas`: JSON schemas as text, by the tool's name. Raises ValueError."""
        return cls({name: ToolSchema(text) for name, text in schemas.items()}, most_chars)

    def check(self, call: Any) -> None:
        """Raises _RefusedError unless it is an allowed call."""
        takes = [key for key in ("arguments", "parameters") if isinstance(call, dict) and key in call]
        if len(takes) != 1 or not isinstance(call.get("name"), str):
            raise _RefusedError(MALFORMED)
        if (schema := self.tools.get(call["name"])) is None:
            raise _RefusedError(UNKNOWN)
        arguments = call[takes[0]]
        if isinstance(arguments, str):  # as OpenAI's API spells them
            try:
                arguments = _parse(arguments)
            except _NoJsonError:
                raise _RefusedError(MALFORMED) from None
        if not isinstance(arguments, dict):
            raise _RefusedError(MALFORMED)
        if not schema.allows(arguments):
            raise _RefusedError(ARGUMENTS)


@dataclass(frozen=True)
class _Braces:
    """Where in a JSON object a text is."""

    at: int = 0  # characters read
    depth: int = 0
    quoted: bool = False
    escaped: bool = False
    end: int = 0  # behind the object; 0: not there yet

    def read(self, text: str, most: int) -> _Braces:
        """Go on in `text`, up to the object's end or to `most`."""
        depth, quoted, escaped = self.depth, self.quoted, self.escaped
        for at in range(self.at, min(len(text), most)):
            char = text[at]
            if escaped:
                escaped = False
            elif quoted:
                escaped, quoted = char == "\\", char != '"'
            elif char == '"':
                quoted = True
            elif char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
                if depth <= 0:
                    return _Braces(at + 1, 0, end=at + 1)
        return _Braces(min(len(text), most), depth, quoted, escaped)


class ToolWatch:
    """A `Watch` for calls that are not allowed."""

    def __init__(self, rules: ToolRules) -> None:
        self._rules = rules
        self._text = ""  # what is in sight; where a call may have begun, from there
        self._offset = 0  # of it, in the answer
        self._form: Literal["", "{"] | str = ""  # what has begun at `_text`
        self._braces = _Braces()
        # An object was longer than a call may be, and was let go: what looks like a call's key from here on is refused.
        self._wide = False
        self.found: Finding | None = None
        self.decided_at = 0
        self.clear = 0

    def feed(self, text: str, *, last: bool = False) -> bool:
        """See `Watch`."""
        if self.found is not None:
            return True
        self._text += text
        try:
            while self._step(last=last):
                pass
        except _Stopped as stop:
            self.clear = self._offset + stop.start
            self.decided_at = self._offset + stop.end
            end = min(self.decided_at, self._offset + len(self._text))
            self.found = Finding("tool", stop.category, 1.0, self.clear, end)
            self._text = ""
            return True
        return False

    def _step(self, *, last: bool) -> bool:
        """Go on by one thing; whether there may be more to do with the text at hand. Raises _Stopped."""
        if not self._form:
            return self._seek()
        if self._form == "{":
            return self._object(last=last)
        most, mark = self._rules.most_chars, len(self._form)
        if self._form == _OPEN and (at := self._text.find(_CLOSE, mark, most)) >= 0:
            end = at + len(_CLOSE)
            self._judge(self._text[mark:at], end)
            self._pass(end)
            return True
        if len(self._text) >= most:
            raise _Stopped(MALFORMED, 0, most)
        if last:
            self._judge(self._text[mark:], len(self._text) + 1)
        return False

    def _seek(self) -> bool:
        """Look for where a call may begin."""
        found = (_MARK if self._wide else _START).search(self._text)
        end = len(self._text)
        if self._wide and (key := self._late_key(found.start() if found else end)) is not None:
            raise _Stopped(MALFORMED, key - 1, key)
        if found is None:
            clear = end - _begun(self._text)
            self.clear = self._offset + clear
            self._cut(max(0, min(clear, end - _CONTEXT)) if self._wide else clear)
            return False
        self._cut(found.start())
        self.clear = self._offset
        self._form, self._braces = found.group(), _Braces()
        return True

    def _late_key(self, end: int) -> int | None:
        """Where a key of a call is complete, behind an object that was let go."""
        keys = (pattern.search(self._text, 0, end) for pattern in (_LATE, _SPELLED))
        return min((key.end() for key in keys if key is not None), default=None)

    def _object(self, *, last: bool) -> bool:
        """A bare object. It is a call if it, or something in it, has a name and takes arguments."""
        most = self._rules.most_chars
        if _NO_OBJECT.match(self._text):
            self._pass(1)
            return True
        self._braces = self._braces.read(self._text, most)
        end = self._braces.end
        if (mark := _MARK.search(self._text, 0, end or min(len(self._text), most))) is not None:
            if _callish(self._text[: mark.start()]):
                raise _Stopped(MALFORMED, 0, mark.end())
            self._pass(mark.start())  # a client looks for marks wherever they are
            return True
        if end:
            self._weigh(self._text[:end], end)
            self._pass(end)
            return True
        if len(self._text) >= most:
            if _callish(self._text[:most]):
                raise _Stopped(MALFORMED, 0, most)
            self._wide, self._form = True, ""
            self._cut(max(0, most - _CONTEXT))
            return True
        if last and _callish(self._text):
            raise _Stopped(MALFORMED, 0, len(self._text) + 1)
        return False

    def _weigh(self, text: str, end: int) -> None:
        """Judge the calls in a complete object, if there are any. Raises _Stopped."""
        try:
            calls = list(_calls(_parse(text)))
        except _NoJsonError:
            if _callish(text):
                raise _Stopped(MALFORMED, 0, end) from None
            return
        try:
            for call in calls:
                self._rules.check(call)
        except _RefusedError as refused:
            raise _Stopped(refused.args[0], 0, end) from None

    def _judge(self, body: str, end: int) -> None:
        """Judge what stands behind a mark: one call or more, and nothing else. Raises _Stopped."""
        try:
            calls = list(_marked(body, self._form))
            if not calls:
                raise _RefusedError(MALFORMED)
            for call in calls:
                self._rules.check(call)
        except _RefusedError as refused:
            raise _Stopped(refused.args[0], 0, end) from None
        except _NoJsonError:
            raise _Stopped(MALFORMED, 0, end) from None

    def _pass(self, end: int) -> None:
        """Let go what was held, up to `end`, and look for the next."""
        self._cut(end)
        self.clear = self._offset
        self._form = ""

    def _cut(self, end: int) -> None:
        self._text, self._offset = self._text[end:], self._offset + end


class _Stopped(Exception):  # noqa: N818  it is the end of the search, and no error
    """A call that may not leave: its category, and where it begins and is decided, in the text in sight."""

    def __init__(self, category: str, start: int, end: int) -> None:
        super().__init__(category)
        self.category, self.start, self.end = category, start, end


def _begun(text: str) -> int:
    """Characters at the end of a text that may be the beginning of a mark."""
    longest = max(map(len, _MARKS)) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(mark.startswith(text[-size:]) for mark in _MARKS)), 0)


def _callish(text: str) -> bool:
    """Whether a text that is no JSON may still be read as a call."""
    return bool((_NAME.search(text) and _TAKES.search(text)) or _SPELLED.search(text))


def _parse(text: str) -> Any:
    """Raises _NoJsonError."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _NoJsonError from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is there twice, readers take one or the other."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(name)  # NaN, Infinity: no JSON


def _calls(value: Any) -> Iterator[dict[str, Any]]:
    """What of a JSON value is a call; not what is in a call's arguments."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict) and "name" in value and ("arguments" in value or "parameters" in value):
            yield value
        elif isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def _marked(body: str, form: str) -> Iterator[Any]:
    """The values behind a mark. Raises _NoJsonError."""
    decoder = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
    at = 0
    while body[at:].strip(" \t\r\n;"):
        at += len(body[at:]) - len(body[at:].lstrip(" \t\r\n;"))
        named = _MISTRAL_CALL.match(body, at) if form == _MISTRAL else None
        try:
            value, at = decoder.raw_decode(body, named.end() if named else at)
        except (ValueError, RecursionError):
            raise _NoJsonError from None
        if named:
            yield {"name": named[1], "arguments": value}
        else:
            yield from value if isinstance(value, list) else [value]
