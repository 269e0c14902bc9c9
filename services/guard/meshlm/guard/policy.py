"""A policy in force: from findings to a verdict, under a version that names everything that decided."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping

from meshlm.chassis.errors import invalid
from meshlm.guard import injection, pii, secrets
from meshlm.guard.config import DEFAULT_POLICY, Act, PolicyConfig
from meshlm.guard.findings import Finding
from meshlm.guard.patterns import Pattern, PatternSet
from meshlm.guard.stream import OutputCheck, by_category
from meshlm.v1 import generation_pb2

# Raised when the meaning of scores or the order of decisions changes; detectors have versions of their own.
_VERSION = "rules-1"

ALLOW = generation_pb2.Verdict.ACTION_ALLOW
FLAG = generation_pb2.Verdict.ACTION_FLAG
BLOCK = generation_pb2.Verdict.ACTION_BLOCK
_OUTPUT: Mapping[str, tuple[str, tuple[Pattern, ...]]] = {
    "secrets": (secrets.VERSION, secrets.PATTERNS),
    "pii": (pii.VERSION, pii.PATTERNS),
}


class Policy:
    """One policy, its patterns compiled."""

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._input_detectors = [injection.VERSION] if "signatures" in config.input_detectors else []
        self._output_detectors = [_OUTPUT[name][0] for name in config.output_detectors]
        known = [pattern for name in config.output_detectors for pattern in _OUTPUT[name][1]]
        acts = {act: [p for p in known if config.action(p.category, p.act) == act] for act in ("block", "flag")}
        self._blocking = PatternSet(acts["block"])
        self._flagging = by_category(acts["flag"])
        content = [dataclasses.asdict(config), self._input_detectors, self._output_detectors]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.version = f"{_VERSION}-{digest[:8]}"

    def trusts(self, role: str) -> bool:
        """Whether messages of this role are the caller's own words."""
        return role in self._config.trusted_roles

    def judge_input(self, texts: Iterable[tuple[int, str]]) -> generation_pb2.Verdict:
        """Verdict on texts, each with its offset; what is found in several of them adds up."""
        found: dict[str, Finding] = {}
        for offset, text in texts:
            for finding in injection.detect(text) if self._input_detectors else ():
                known = found.get(finding.rule)
                if self._config.action(finding.category, "block") == "allow":
                    continue
                if known is None or finding.score > known.score:
                    found[finding.rule] = dataclasses.replace(
                        finding, start=finding.start + offset, end=finding.end + offset
                    )
        findings = list(found.values())
        score = injection.combined(findings)
        verdict = self._verdict(self._input_action(findings, score), findings, self._input_detectors)
        verdict.score = score
        return verdict

    def output_check(self) -> OutputCheck:
        """For one choice of one answer."""
        return OutputCheck(self._blocking, self._flagging)

    def judge_output(self, check: OutputCheck) -> generation_pb2.Verdict:
        """Verdict on what a check has seen so far."""
        blocked = check.blocked
        findings = [*([blocked] if blocked is not None else []), *check.flagged]
        action = BLOCK if blocked is not None else FLAG if findings else ALLOW
        return self._verdict(action, findings, self._output_detectors, blocked)

    def _input_action(self, findings: list[Finding], score: float) -> generation_pb2.Verdict.Action.ValueType:
        if score < self._config.flag_score:
            return ALLOW
        # A category that may only be told does not refuse, however sure; but it supports one that may.
        refusing = [f for f in findings if self._config.action(f.category, "block") == "block"]
        return BLOCK if refusing and score >= self._config.block_score else FLAG

    def _verdict(
        self,
        action: generation_pb2.Verdict.Action.ValueType,
        findings: list[Finding],
        detectors: list[str],
        strongest: Finding | None = None,
    ) -> generation_pb2.Verdict:
        verdict = generation_pb2.Verdict(action=action, policy_version=self.version, detectors=detectors)
        if findings:
            strongest = strongest or max(findings, key=lambda f: (f.score, -f.start))
            verdict.categories.extend(sorted({finding.category for finding in findings}))
            verdict.score = strongest.score
            verdict.char_start, verdict.char_end = strongest.start, strongest.end
        return verdict


class Policies:
    """The policies of the configuration, by name."""

    def __init__(self, configs: Mapping[str, PolicyConfig]) -> None:
        self._policies = {name: Policy(c) for name, c in ({DEFAULT_POLICY: PolicyConfig()} | dict(configs)).items()}

    def get(self, name: str) -> Policy:
        """The policy; the default one for an empty name. Raises MeshError REQUEST_INVALID."""
        policy = self._policies.get(name or DEFAULT_POLICY)
        if policy is None:
            raise invalid("policy", "no such policy")
        return policy


def act_name(action: generation_pb2.Verdict.Action.ValueType) -> Act:
    """As the configuration spells it, for metrics and spans."""
    return "block" if action == BLOCK else "flag" if action == FLAG else "allow"
