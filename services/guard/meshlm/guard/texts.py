"""Secrets and personal data in texts that are there as a whole, found as they are found in a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshlm.guard import pii, secrets
from meshlm.guard.config import PolicyConfig
from meshlm.guard.findings import Finding
from meshlm.guard.patterns import Pattern, PatternSet
from meshlm.guard.watches import PatternWatch, Redacted, Redactor, Watch, by_category

# By the name that the configuration gives them: version and patterns.
DETECTORS: Mapping[str, tuple[str, tuple[Pattern, ...]]] = {
    "secrets": (secrets.VERSION, secrets.PATTERNS),
    "pii": (pii.VERSION, pii.PATTERNS),
}
_STEP = 512


class Patterns:
    """The patterns of some detectors, by what a policy makes of them."""

    def __init__(self, config: PolicyConfig, detectors: Sequence[str]) -> None:
        known = [pattern for name in detectors if name in DETECTORS for pattern in DETECTORS[name][1]]
        acts = {p: config.action(p.category, p.act) for p in known}
        self.versions = [DETECTORS[name][0] for name in detectors if name in DETECTORS]
        self._blocking = PatternSet(p for p in known if acts[p] == "block")
        self._redacting = PatternSet(p for p in known if acts[p] == "redact")
        self._flagging = by_category([p for p in known if acts[p] == "flag"])
        self.redacts = bool(self._redacting.patterns)

    def blocking(self) -> list[Watch]:
        """Watches that stop a text."""
        return [PatternWatch(self._blocking)]

    def flagging(self) -> list[Watch]:
        """Watches that tell, one for each category."""
        return [PatternWatch(patterns) for patterns in self._flagging]

    def redactor(self) -> Redactor | None:
        """What replaces, if anything is replaced."""
        return Redactor(self._redacting) if self.redacts else None

    def read(self, text: str) -> Read:
        """All that is found in a whole text."""
        blocked, flagged, redactor = self.blocking(), self.flagging(), self.redactor()
        watches = [*blocked, *flagged, *([redactor] if redactor is not None else [])]
        for at in range(0, len(text), _STEP):
            for watch in watches:
                watch.feed(text[at : at + _STEP])
        for watch in watches:
            watch.feed("", last=True)
        return Read(
            [watch.found for watch in blocked if watch.found is not None],
            [watch.found for watch in flagged if watch.found is not None],
            redactor.redacted if redactor is not None else (),
        )

    def rewrite(self, text: str) -> str:
        """The text with what is replaced replaced."""
        parts, at = [], 0
        for redacted in self.read(text).redacted:
            parts += [text[at : redacted.finding.start], redacted.replacement]
            at = redacted.finding.end
        return "".join([*parts, text[at:]])


@dataclass(frozen=True)
class Read:
    """What was found in a text: what stops it, what is only told, and what is replaced."""

    blocked: Sequence[Finding]
    flagged: Sequence[Finding]
    redacted: Sequence[Redacted]


def moved(finding: Finding, offset: int) -> Finding:
    """A finding of a part, in the whole."""
    return replace(finding, start=finding.start + offset, end=finding.end + offset)
