"""A policy in force: from findings to a verdict, under a version that names everything that decided."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial

from meshlm.chassis.errors import invalid
from meshlm.guard import injection, pii, secrets
from meshlm.guard.config import DEFAULT_POLICY, Act, PolicyConfig
from meshlm.guard.embedded import EmbeddedModel, Scored
from meshlm.guard.findings import Finding
from meshlm.guard.judging import Head
from meshlm.guard.patterns import Pattern, PatternSet
from meshlm.guard.stream import ContentWatch, OutputCheck, by_category
from meshlm.v1 import generation_pb2

# Raised when the meaning of scores or the order of decisions changes; detectors have versions of their own.
_VERSION = "rules-1"

ALLOW = generation_pb2.Verdict.ACTION_ALLOW
FLAG = generation_pb2.Verdict.ACTION_FLAG
BLOCK = generation_pb2.Verdict.ACTION_BLOCK
# What the model calls an attack; harm goes by Llama Guard's codes.
ATTACK = "injection.model"
_SEVERITY = (ALLOW, FLAG, BLOCK)
_HEADS: tuple[Head, ...] = ("attack", "harm")
_OUTPUT: Mapping[str, tuple[str, tuple[Pattern, ...]]] = {
    "secrets": (secrets.VERSION, secrets.PATTERNS),
    "pii": (pii.VERSION, pii.PATTERNS),
}


class Policy:
    """One policy, its patterns compiled."""

    def __init__(self, config: PolicyConfig, model: EmbeddedModel | None = None) -> None:
        """Without a model, its detectors do not run."""
        self._config = config
        self._model = model
        self._heads = tuple(h for h in _HEADS if model is not None and h in config.input_detectors)
        self._rules = "signatures" in config.input_detectors
        self._input_detectors = [injection.VERSION] if self._rules else []
        self._output_detectors = [_OUTPUT[name][0] for name in config.output_detectors if name in _OUTPUT]
        if model is not None:
            self._input_detectors += [f"{model.version}/{head}" for head in self._heads]
            self._output_detectors += [f"{model.version}/harm"] if "harm" in config.output_detectors else []
        known = [pattern for name in config.output_detectors if name in _OUTPUT for pattern in _OUTPUT[name][1]]
        acts = {act: [p for p in known if config.action(p.category, p.act) == act] for act in ("block", "flag")}
        self._blocking = PatternSet(acts["block"])
        self._flagging = by_category(acts["flag"])
        content = [dataclasses.asdict(config), self._input_detectors, self._output_detectors]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.version = f"{_VERSION if model is None else f'{_VERSION}+{model.version}'}-{digest[:8]}"

    def trusts(self, role: str) -> bool:
        """Whether messages of this role are the caller's own words."""
        return role in self._config.trusted_roles

    def judge_input(self, texts: Iterable[tuple[int, str]]) -> generation_pb2.Verdict:
        """Verdict on texts, each with its offset; what rules find in several of them adds up, and the model's highest
        score counts."""
        found: dict[str, Finding] = {}
        best: dict[Head, Scored] = {}
        for offset, text in texts:
            for finding in injection.detect(text) if self._rules else ():
                known = found.get(finding.rule)
                if self._config.action(finding.category, "block") == "allow":
                    continue
                if known is None or finding.score > known.score:
                    found[finding.rule] = dataclasses.replace(
                        finding, start=finding.start + offset, end=finding.end + offset
                    )
            for head, scored in self._scores(text).items():
                if head not in best or scored.score > best[head].score:
                    best[head] = dataclasses.replace(scored, start=scored.start + offset, end=scored.end + offset)
        findings = list(found.values())
        score = injection.combined(findings)
        action = self._input_action(findings, score)
        for head, scored in best.items():
            judged, told = self._model_action(head, scored)
            action = max(action, judged, key=_SEVERITY.index)
            findings += told
            score = max(score, scored.score)
        verdict = self._verdict(action, findings, self._input_detectors)
        verdict.score = score
        return verdict

    def output_check(self) -> OutputCheck:
        """For one choice of one answer."""
        content = None
        if self._model is not None and "harm" in self._config.output_detectors:
            content = ContentWatch(
                partial(self._judge_content, self._model), strict=self._config.answer_release == "strict"
            )
        return OutputCheck(self._blocking, self._flagging, content)

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

    def _scores(self, text: str) -> dict[Head, Scored]:
        return self._model.judge(text, self._heads) if self._model is not None and self._heads else {}

    def _model_action(
        self, head: Head, scored: Scored
    ) -> tuple[generation_pb2.Verdict.Action.ValueType, list[Finding]]:
        """What follows from a head's score of an input, and what is told of it."""
        attack = head == "attack"
        flag = self._config.attack_flag_score if attack else self._config.harm_flag_score
        block = self._config.attack_block_score if attack else self._config.harm_block_score
        if scored.score < flag:
            return ALLOW, []
        acts = {category: self._config.action(category, "block") for category in self._named(head, scored.text)}
        told = [
            Finding(f"model.{head}", category, scored.score, scored.start, scored.end)
            for category, act in acts.items()
            if act != "allow"
        ]
        if not told:
            return ALLOW, []
        return (BLOCK if scored.score >= block and "block" in acts.values() else FLAG), told

    def _named(self, head: Head, text: str) -> tuple[str, ...]:
        """Categories of what a head found in a window."""
        return (ATTACK,) if head == "attack" or self._model is None else self._model.categories(text)

    def _judge_content(self, model: EmbeddedModel, text: str) -> tuple[Finding, bool] | None:
        """What is harmful in the last of an answer, and whether it stops it."""
        score = model.score(text, "harm")
        if score < self._config.answer_flag_score:
            return None
        acts = {category: self._config.action(category, "block") for category in model.categories(text)}
        stops = score >= self._config.answer_block_score and "block" in acts.values()
        chosen = next((c for c, act in acts.items() if act == "block" or (act == "flag" and not stops)), None)
        return None if chosen is None else (Finding("model.harm", chosen, score, 0, len(text)), stops)

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

    def __init__(self, configs: Mapping[str, PolicyConfig], model: EmbeddedModel | None = None) -> None:
        known = {DEFAULT_POLICY: PolicyConfig()} | dict(configs)
        self._policies = {name: Policy(config, model) for name, config in known.items()}

    def get(self, name: str) -> Policy:
        """The policy; the default one for an empty name. Raises MeshError REQUEST_INVALID."""
        policy = self._policies.get(name or DEFAULT_POLICY)
        if policy is None:
            raise invalid("policy", "no such policy")
        return policy


def act_name(action: generation_pb2.Verdict.Action.ValueType) -> Act:
    """As the configuration spells it, for metrics and spans."""
    return "block" if action == BLOCK else "flag" if action == FLAG else "allow"
