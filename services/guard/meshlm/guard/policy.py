"""A policy in force: from findings to a verdict, under a version that names everything that decided."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import structlog

from meshlm.chassis import telemetry
from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.chassis.telemetry import Name
from meshlm.guard import indirect, injection, languages, scripts
from meshlm.guard.answer_rules import AnswerRules
from meshlm.guard.config import DEFAULT_POLICY, Act, PolicyConfig
from meshlm.guard.content import ContentWatch, Weighed
from meshlm.guard.conversation import gathered, rewritten
from meshlm.guard.findings import Finding
from meshlm.guard.judging import Head, Judge, JudgeError, Opinion, Turn
from meshlm.guard.lookback import View
from meshlm.guard.stream import OutputCheck
from meshlm.guard.texts import Patterns, moved
from meshlm.v1 import generation_pb2

log = structlog.get_logger()
T = TypeVar("T")

# Raised when the meaning of scores or the order of decisions changes; detectors have versions of their own.
_VERSION = "rules-1"

ALLOW = generation_pb2.Verdict.ACTION_ALLOW
FLAG = generation_pb2.Verdict.ACTION_FLAG
BLOCK = generation_pb2.Verdict.ACTION_BLOCK
REDACT = generation_pb2.Verdict.ACTION_REDACT
_SEVERITY = (ALLOW, FLAG, REDACT, BLOCK)
_NAMES: Mapping[int, Act] = {ALLOW: "allow", FLAG: "flag", REDACT: "redact", BLOCK: "block"}
_HEADS: tuple[Head, ...] = ("attack", "harm")


class Policy:
    """One policy, its patterns compiled."""

    def __init__(self, config: PolicyConfig, judge: Judge | None = None, *, inline_chars: int = 4_096) -> None:
        """Without a judge, the detectors that are models do not run. `inline_chars`: see `GuardConfig`."""
        self.config = config
        self._judge = judge
        self._inline_chars = inline_chars
        self._heads = tuple(h for h in _HEADS if judge is not None and h in config.input_detectors)
        self._rules = "signatures" in config.input_detectors
        self._input_detectors = [injection.VERSION] if self._rules else []
        self._input_detectors += [scripts.VERSION] if config.scripts else []
        self._input_detectors += [languages.VERSION] if config.languages else []
        self._in_input = Patterns(config, config.input_detectors)
        self._in_output = Patterns(config, config.output_detectors)
        self._input_detectors += self._in_input.versions
        self._answers = AnswerRules(config)
        self._output_detectors = [*self._in_output.versions, *self._answers.versions]
        self.version = self._version()
        self._failures = telemetry.meter().create_counter(
            Name.GUARD_JUDGE_FAILURES, "1", "Times a model could not judge, by direction and what followed"
        )

    @property
    def redacts_input(self) -> bool:
        """Whether an input may be changed."""
        return self._in_input.redacts and not self.config.shadow

    async def judge_input(
        self, turns: Sequence[Turn], *, tenant: str = "", request_id: str = ""
    ) -> generation_pb2.Verdict:
        """Verdict on an input; what rules find in several turns adds up, and a model's highest score counts. Texts of
        others are judged by themselves.

        Raises MeshError GUARD_UNAVAILABLE where the model cannot judge and the policy refuses then.
        """
        own, others = indirect.split(turns)
        verdict = await self._judge_turns(own, tenant, request_id)
        if others:
            verdict = indirect.merged(verdict, await self._for_others._judge_turns(others, tenant, request_id))
        return verdict

    @property
    def _for_others(self) -> Policy:
        """The same with the thresholds for texts of others, under the same version."""
        policy = copy.copy(self)
        policy.config = indirect.thresholds(self.config)
        return policy

    async def _judge_turns(self, turns: Sequence[Turn], tenant: str, request_id: str) -> generation_pb2.Verdict:
        read = gathered(turns)
        found = await self._run(sum(len(turn.text) for turn in read), lambda: self._by_rules(read))
        findings, score = found.findings, found.score
        action = max(self._input_action(findings, score), found.action, key=_SEVERITY.index)
        findings, score = findings + found.patterns, max([score, *(f.score for f in found.patterns)])
        detectors = list(self._input_detectors)
        for opinion in await self._opinions(turns, tenant, request_id) if self._heads and read else ():
            judged, told = self._model_action(opinion)
            action = max(action, judged, key=_SEVERITY.index)
            findings += told
            score = max(score, opinion.score)
            detectors.append(opinion.detector)
        verdict = self._verdict(action, findings, detectors)
        verdict.score = score
        return verdict

    async def redact(self, source: generation_pb2.Input) -> generation_pb2.Input | None:
        """The input with what is replaced replaced; None where nothing is."""
        roles = self.config.trusted_roles
        return await self._run(source.ByteSize(), lambda: rewritten(source, roles, self._in_input.rewrite))

    def output_check(
        self, turns: Sequence[Turn] = (), *, tenant: str = "", request_id: str = "", canaries: Sequence[str] = ()
    ) -> OutputCheck:
        """For one choice of the answer to `turns`, which may hold no canary. Raises MeshError REQUEST_INVALID."""
        content = None
        if self._judge is not None and "harm" in self.config.output_detectors:

            async def weigh(view: View) -> Weighed:
                return await self._weigh(turns, view, tenant, request_id)

            content = ContentWatch(weigh, self.config.answer_windows, strict=self.config.answer_release == "strict")
        patterns, answers = self._in_output, self._answers
        return OutputCheck(
            [*patterns.blocking(), *answers.watches(canaries, "block")],
            [*patterns.flagging(), *answers.watches(canaries, "flag")],
            content,
            patterns.redactor(),
            shadow=self.config.shadow,
        )

    def judge_output(self, check: OutputCheck) -> generation_pb2.Verdict:
        """Verdict on what a check has seen so far; BLOCK once no opinion still awaited can say what else stops it."""
        blocked, redacted = check.blocked if check.decided else None, [redacted.finding for redacted in check.redacted]
        findings = [*([blocked] if blocked is not None else []), *check.flagged, *redacted]
        action = BLOCK if blocked is not None else REDACT if redacted else FLAG if findings else ALLOW
        return self._verdict(action, findings, [*self._output_detectors, *check.detectors], blocked)

    def _version(self) -> str:
        content = [dataclasses.asdict(self.config), self._input_detectors, self._output_detectors]
        name = _VERSION if self._judge is None else f"{_VERSION}+{self._judge.version}"
        digest = hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()
        return f"{name}-{digest[:8]}"

    async def _run(self, size: int, work: Callable[[], T]) -> T:
        """Long inputs in a thread, so that other streams go on."""
        return await asyncio.to_thread(work) if size > self._inline_chars else work()

    def _by_rules(self, turns: Sequence[Turn]) -> _Ruled:
        findings = self._find(turns) if self._rules else []
        action, patterns = ALLOW, []
        for turn in turns:
            for finding in self._strange(turn.text):
                patterns.append(moved(finding, turn.offset))
                act = self.config.action(finding.category, "block")
                action = max(action, BLOCK if act == "block" else FLAG, key=_SEVERITY.index)
        for turn in turns if self._in_input.versions else ():
            read = self._in_input.read(turn.text)
            patterns += [moved(f, turn.offset) for f in (*read.blocked, *read.flagged)]
            patterns += [moved(redacted.finding, turn.offset) for redacted in read.redacted]
            found = BLOCK if read.blocked else REDACT if read.redacted else FLAG if read.flagged else ALLOW
            action = max(action, found, key=_SEVERITY.index)
        return _Ruled(findings, injection.combined(findings), action, patterns)

    def _strange(self, text: str) -> list[Finding]:
        """What a text is written in, where the policy does not want it."""
        found = scripts.detect(text, self.config.scripts) if self.config.scripts else []
        found += languages.detect(text, self.config.languages) if self.config.languages else []
        return [finding for finding in found if self.config.action(finding.category, "block") != "allow"]

    def _find(self, turns: Sequence[Turn]) -> list[Finding]:
        """The strongest finding of each rule."""
        found: dict[str, Finding] = {}
        for turn in turns:
            for finding in injection.detect(turn.text):
                if self.config.action(finding.category, "block") == "allow":
                    continue
                known = found.get(finding.rule)
                if known is None or finding.score > known.score:
                    found[finding.rule] = moved(finding, turn.offset)
        return list(found.values())

    def _input_action(self, findings: list[Finding], score: float) -> generation_pb2.Verdict.Action.ValueType:
        if score < self.config.flag_score:
            return ALLOW
        # A category that may only be told does not refuse, however sure; but it supports one that may.
        refusing = [f for f in findings if self.config.action(f.category, "block") == "block"]
        return BLOCK if refusing and score >= self.config.block_score else FLAG

    async def _opinions(self, turns: Sequence[Turn], tenant: str, request_id: str) -> list[Opinion]:
        assert self._judge is not None  # noqa: S101
        try:
            return await self._judge.judge_prompt(turns, self._heads, tenant=tenant, request_id=request_id)
        except JudgeError:
            self._fail("input")
            return []

    def _fail(self, direction: str) -> None:
        """The model cannot judge. Raises MeshError GUARD_UNAVAILABLE, unless the policy lets rules decide alone."""
        failure = "allow" if self.config.shadow else self.config.failure
        self._failures.add(1, {Name.GUARD_DIRECTION: direction, Name.GUARD_FAILURE: failure})
        log.warning("a model cannot judge", direction=direction, failure=failure)
        if failure == "refuse":
            raise MeshError(Reason.GUARD_UNAVAILABLE, "the guard's model does not answer", retry_after=1.0) from None

    def _model_action(self, opinion: Opinion) -> tuple[generation_pb2.Verdict.Action.ValueType, list[Finding]]:
        """What follows from a model's opinion of an input, and what is told of it."""
        attack = opinion.head == "attack"
        flag = self.config.attack_flag_score if attack else self.config.harm_flag_score
        block = self.config.attack_block_score if attack else self.config.harm_block_score
        if opinion.score < flag:
            return ALLOW, []
        acts = self._acts(opinion)
        told = [
            Finding(f"model.{opinion.head}", category, opinion.score, opinion.start, opinion.end)
            for category, act in acts.items()
            if act != "allow"
        ]
        if not told:
            return ALLOW, []
        return (BLOCK if opinion.score >= block and "block" in acts.values() else FLAG), told

    def _acts(self, opinion: Opinion) -> dict[str, Act]:
        """What may follow from each category of an opinion; one that names none goes by its head's name."""
        categories = opinion.categories or (f"{opinion.head}.unnamed",)
        return {category: self.config.action(category, "block") for category in categories}

    async def _weigh(self, turns: Sequence[Turn], view: View, tenant: str, request_id: str) -> Weighed:
        """What is harmful in an answer so far, and what follows. Raises MeshError GUARD_UNAVAILABLE."""
        assert self._judge is not None  # noqa: S101
        try:
            opinions = await self._judge.judge_answer(turns, view.text, ("harm",), tenant=tenant, request_id=request_id)
        except JudgeError:
            self._fail("output")
            return Weighed()
        if not opinions:
            return Weighed()
        opinion = max(opinions, key=lambda opinion: opinion.score)
        detectors = tuple(opinion.detector for opinion in opinions)
        if opinion.score < self.config.answer_flag_score:
            return Weighed(detectors=detectors)
        acts = self._acts(opinion)
        stops = opinion.score >= self.config.answer_confirm_score and "block" in acts.values()
        chosen = next((c for c, act in acts.items() if act == "block" or (act == "flag" and not stops)), None)
        if chosen is None:
            return Weighed(detectors=detectors)
        finding = Finding("model.harm", chosen, opinion.score, opinion.start, opinion.end)
        hard = opinion.score >= self.config.answer_block_score
        return Weighed("flag" if not stops else "hard" if hard else "soft", finding, detectors)

    def _verdict(
        self,
        action: generation_pb2.Verdict.Action.ValueType,
        findings: list[Finding],
        detectors: list[str],
        strongest: Finding | None = None,
    ) -> generation_pb2.Verdict:
        verdict = generation_pb2.Verdict(action=action, policy_version=self.version, detectors=detectors)
        if self.config.shadow:
            verdict.shadow_action = action
            verdict.action = ALLOW if action == ALLOW else FLAG
        if findings:
            strongest = strongest or max(findings, key=lambda f: (f.score, -f.start))
            verdict.categories.extend(sorted({finding.category for finding in findings}))
            verdict.score = strongest.score
            verdict.char_start, verdict.char_end = strongest.start, strongest.end
        return verdict


@dataclasses.dataclass(frozen=True)
class _Ruled:
    """What rules find in an input: attacks, which add up, and what follows from secrets and personal data."""

    findings: list[Finding]
    score: float
    action: generation_pb2.Verdict.Action.ValueType
    patterns: list[Finding]


class Policies:
    """The policies of the configuration, by name."""

    def __init__(
        self, configs: Mapping[str, PolicyConfig], judge: Judge | None = None, *, inline_chars: int = 4_096
    ) -> None:
        self._judge = judge
        self._inline_chars = inline_chars
        self._policies = self.prepare(configs)

    def prepare(self, configs: Mapping[str, PolicyConfig]) -> dict[str, Policy]:
        """Policies of another configuration, made but not in force."""
        known = {DEFAULT_POLICY: PolicyConfig()} | dict(configs)
        return {name: Policy(config, self._judge, inline_chars=self._inline_chars) for name, config in known.items()}

    def replace(self, policies: dict[str, Policy]) -> None:
        """All at once: what was begun under an old policy ends under it."""
        self._policies = policies

    def get(self, name: str) -> Policy:
        """The policy; the default one for an empty name. Raises MeshError REQUEST_INVALID."""
        policy = self._policies.get(name or DEFAULT_POLICY)
        if policy is None:
            raise invalid("policy", "no such policy")
        return policy


def act_name(action: generation_pb2.Verdict.Action.ValueType) -> Act:
    """As the configuration spells it, for metrics and spans."""
    return _NAMES.get(action, "allow")
