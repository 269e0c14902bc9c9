"""Secrets in answers: credentials whose form is public.

Forms are those that the issuers publish and that gitleaks and detect-secrets look for, shortened to the part that
decides, and bounded: an answer must be stopped before a secret is complete, not after. Those packages' own patterns
are unbounded and read files, which a stream cannot use.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace

from meshlm.guard.patterns import Pattern

VERSION = "secrets/1"

_END = r"[^A-Za-z0-9]"


def _varied(text: str) -> bool:
    """Whether it is no placeholder: `sk-xxxx...`, `AKIA...EXAMPLE`, `ghp_1234567890...`."""
    lowered = text.lower()
    if "example" in lowered or "1234567890" in lowered or "abcdefghij" in lowered:
        return False
    return len(set(text[-16:])) >= 7


def _random(text: str) -> bool:
    """Whether the value of an assignment looks drawn by lot: its characters carry at least 3.5 bits each."""
    value = re.split(":=|[:=]", text, maxsplit=1)[1].strip(" \t\"'`=")
    counts = Counter(value)
    entropy = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return entropy >= 3.5 and any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


_PEM = (
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----(?:\\[nr]|[\s\"'+]){1,8}"
    r"(?:[A-Z][A-Za-z-]{2,15}: [^\n]{1,80}\n{1,2}){0,3}[A-Za-z0-9+/]{32}"
)

_LINE_END = r"(?:\\[nr]|[\s\"'+])"
# The lines of a key: full ones, and a short last one where the end is marked.
_PEM_REST = (
    rf"[A-Za-z0-9+/=]*+(?:{_LINE_END}{{1,8}}[A-Za-z0-9+/=]{{24,}}+)*"
    rf"(?:{_LINE_END}{{1,8}}(?:[A-Za-z0-9+/]{{1,23}}={{0,2}}{_LINE_END}{{1,8}})?-----END [A-Z ]{{0,30}}-----)?"
)

_PATTERNS = (
    Pattern("secret.aws_access_key", r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}", _END, check=_varied),
    Pattern("secret.github_token", r"gh[pousr]_[A-Za-z0-9]{36}", check=_varied),
    Pattern("secret.github_token", r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{40}", check=_varied),
    Pattern("secret.gitlab_token", r"glpat-[A-Za-z0-9_-]{20}", check=_varied),
    Pattern("secret.slack_token", r"xox[abposr]-[0-9]{10,13}-[0-9]{10,13}-[A-Za-z0-9-]{20}"),
    Pattern("secret.slack_token", r"xapp-[0-9]-[A-Z0-9]{8,12}-[0-9]{10,13}-[a-z0-9]{40}"),
    Pattern(
        "secret.slack_webhook", r"https://hooks\.slack\.com/services/T[A-Z0-9]{8,11}/B[A-Z0-9]{8,11}/[A-Za-z0-9]{20}"
    ),
    Pattern("secret.google_api_key", r"AIza[A-Za-z0-9_-]{35}", check=_varied),
    Pattern("secret.google_oauth_secret", r"GOCSPX-[A-Za-z0-9_-]{28}", check=_varied),
    Pattern("secret.stripe_key", r"[sr]k_live_[A-Za-z0-9]{24}", check=_varied),
    Pattern("secret.openai_key", r"sk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}"),
    Pattern("secret.openai_key", r"sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40}", check=_varied),
    Pattern("secret.anthropic_key", r"sk-ant-[a-z]{2,8}[0-9]{2}-[A-Za-z0-9_-]{40}", check=_varied),
    Pattern("secret.huggingface_token", r"hf_[A-Za-z0-9]{34}", check=_varied),
    Pattern("secret.npm_token", r"npm_[A-Za-z0-9]{36}", check=_varied),
    Pattern("secret.pypi_token", r"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50}"),
    Pattern("secret.sendgrid_key", r"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}", check=_varied),
    Pattern("secret.digitalocean_token", r"do[opr]_v1_[a-f0-9]{64}", check=_varied),
    Pattern("secret.private_key", _PEM, rest=_PEM_REST),
    Pattern("secret.jwt", r"eyJ[A-Za-z0-9_-]{10,160}\.eyJ[A-Za-z0-9_-]{10,240}\.[A-Za-z0-9_-]{16}"),
    Pattern(
        "secret.assignment",
        r"(?i:(?:api|access|auth|secret|private)?[_-]?(?:key|token|secret|password|passwd)[\"']?"
        r"[ \t]{0,3}(?::|=|:=)[ \t]{0,3}[\"'`]?[A-Za-z0-9+/_.-]{20,100}={0,2}[\"'`]?)",
        r"[^A-Za-z0-9+/_.=\"'`-]",
        score=0.6,
        act="flag",
        check=_random,
    ),
)

# Forms are shortened to what decides: more of the same word belongs to it.
PATTERNS = tuple(
    pattern if pattern.after or pattern.rest else replace(pattern, rest=r"[A-Za-z0-9_.-]*+") for pattern in _PATTERNS
)
