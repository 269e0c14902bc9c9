"""Why a verdict is what it is: the rules that matched, the model's scores, and the n-grams that weighed most."""

from __future__ import annotations

from dataclasses import dataclass

from meshlm.guard import injection
from meshlm.guard.embedded import EmbeddedModel, Scored
from meshlm.guard.findings import Finding
from meshlm.guard.judging import Head, Turn
from meshlm.guard.policy import Policy
from meshlm.v1 import generation_pb2


@dataclass(frozen=True)
class Explanation:
    """A verdict on an input, taken apart."""

    verdict: generation_pb2.Verdict
    # What the rules found, strongest first, whatever the policy makes of it.
    findings: list[Finding]
    # For each head: its score, and the n-grams that moved its log-odds most, with by how much. Empty without a model.
    scores: dict[Head, tuple[Scored, list[tuple[str, float]]]]
    # What the text would be about, were it harmful: S1 to S14, the likeliest first.
    categories: tuple[str, ...]


async def explain(policy: Policy, model: EmbeddedModel | None, text: str, most: int = 8) -> Explanation:
    """The policy's verdict on a text, and what it came from. `most`: n-grams for each head."""
    findings = sorted(injection.detect(text), key=lambda finding: -finding.score)
    judged = model.judge(text) if model is not None else {}
    scores = {head: (found, model.explain(found.text, head, most)) for head, found in judged.items()} if model else {}
    categories = model.categories(judged["harm"].text) if model is not None else ()
    return Explanation(await policy.judge_input([Turn("user", text)]), findings, scores, categories)
