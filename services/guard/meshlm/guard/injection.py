"""The input detector: signatures over every reading of a text and of what is wrapped in it.

What rules cannot do: know a paraphrase that the table does not have, an attack spread over several turns, a language
outside the table (English in breadth; the commonest phrases of German, French, Spanish, Italian, Portuguese, Russian,
Chinese and Japanese), optimised suffixes, ciphers that have a key, or text wrapped twice. And
they can be talked round: a phrase in quotation marks beside words about attacks weighs half, whoever wrote it. Judging
intent is a model's task.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from meshlm.guard.encodings import unwrap
from meshlm.guard.findings import Finding
from meshlm.guard.normalize import Reading, fold, readings
from meshlm.guard.signatures import NEEDS, SIGNATURES, VERSION, Signature

__all__ = ["VERSION", "combined", "detect"]

# Words that were hidden from a plain reader are evidence by themselves.
_HIDDEN_WEIGHT = 0.3
# A phrase that is quoted or reported, in a text about such phrases, is more likely talked about than meant.
_DISCUSSED_FACTOR = 0.5
_CONTEXT = 400  # characters on either side that say what a text is about
_QUOTE_REACH = 80  # characters between a phrase and the quotation mark that encloses it

_ABOUT = re.compile(
    fold(
        r"\b(?:prompt.?injections?|jailbreak(?:s|ing)?|attacks?|attackers?|e\.g|for (?:example|instance)|such as|"
        r"phrases?|examples?|red.?team\w*|detect\w*|classif\w+|malicious|vulnerab\w+|owasp|mean(?:s|ing)?|"
        r"security|adversar\w+|article|paper|blog|filter|block(?:s|ed)?|"
        r"beispiel\w*|angriff\w*|bedeutet|exemples?|attaques?|signifie|ejemplos?|ataques?|significa|"
        r"пример\w*|атак\w*|означает)\b|例如|攻击|注入|什么意思|越狱"
    )
)
_OPENING = re.compile(r"[\"'`“”„«‘’「『](?=[^\n\"`“”„«»「」『』]{0,80}$)")
_CLOSING = re.compile(r"[^\n\"`“”„«»「」『』]{0,80}?[\"'`”“»’」』]")
# "attackers tell the model to ..."; an order to the reader ("I tell you to ...") is none of these.
_REPORTED = re.compile(
    r"\b(?:tell|ask|instruct|trick|convinc|get|caus|urg|try|attempt|manipulat|persuad)\w{0,4}\W{1,3}"
    r"(?:(?!you\b|i\b)\w{1,20}\W{1,3}){0,5}to\W{1,3}$"
)


def detect(text: str) -> list[Finding]:
    """Findings in a text: at most one for each signature, its strongest. Ranges are those of `text`."""
    best: dict[str, Finding] = {}
    plain: set[str] = set()
    for reading in readings(text):
        for finding in _matches(reading):
            if not reading.hidden:
                plain.add(finding.rule)
            _keep(best, finding)
    hidden = [best[rule] for rule in best if rule not in plain]
    for carrier in unwrap(text):
        for inner in readings(carrier.text):
            for finding in _matches(inner):
                moved = replace(finding, start=carrier.start, end=carrier.end)
                _keep(best, moved)
                hidden.append(moved)
    if hidden:
        strongest = max(hidden, key=lambda finding: finding.score)
        _keep(best, replace(strongest, rule="hidden", category="injection.obfuscated", score=_HIDDEN_WEIGHT))
    return list(best.values())


def combined(findings: list[Finding]) -> float:
    """Score of several findings, taken as independent evidence: 1 - (1 - a)(1 - b)... Range [0, 1]."""
    doubt = 1.0
    for finding in findings:
        doubt *= 1.0 - finding.score
    return 1.0 - doubt


def _matches(reading: Reading) -> Iterator[Finding]:
    present = {need for need in NEEDS if need in reading.text}
    for signature in SIGNATURES:
        if not present.isdisjoint(signature.needs):
            yield from _occurrences(signature, reading)


def _occurrences(signature: Signature, reading: Reading) -> Iterator[Finding]:
    """The first occurrence; and the first that is meant, if that is another one."""
    for count, match in enumerate(signature.pattern.finditer(reading.text)):
        start, end = match.span()
        discussed = not reading.hidden and _discussed(reading.text, start, end)
        weight = signature.weight * (_DISCUSSED_FACTOR if discussed else 1.0)
        if count == 0 or not discussed:
            yield Finding(signature.rule, signature.category, weight, *reading.span(start, end))
        if not discussed or count == _MOST_OCCURRENCES:
            return


# Occurrences of one signature that are looked at: a text that quotes more has had its say.
_MOST_OCCURRENCES = 50


def _discussed(text: str, start: int, end: int) -> bool:
    before, after = text[max(0, start - _CONTEXT) : start], text[end : end + _CONTEXT]
    quoted = _OPENING.search(before[-_QUOTE_REACH - 1 :]) is not None and _CLOSING.match(after) is not None
    if not quoted and _REPORTED.search(before[-160:]) is None:
        return False
    return _ABOUT.search(before) is not None or _ABOUT.search(after) is not None


def _keep(best: dict[str, Finding], finding: Finding) -> None:
    known = best.get(finding.rule)
    if known is None or finding.score > known.score:
        best[finding.rule] = finding
