"""From what was seen in a request to a risk in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable

from meshlm.chassis.errors import Reason
from meshlm.router.risk.surprise import UNPROVEN
from meshlm.router.work import Work
from meshlm.v1 import generation_pb2 as pb

# The guard's score of what it lets through counts from here on.
_LET_THROUGH = 0.5
# No attacks on the model: personal data and secrets are for the guard to hold back.
_NO_ATTACKS = ("pii.", "secret.")
_REFUSED = (Reason.PROMPT_UNSAFE, Reason.INJECTION_SUSPECTED, Reason.OUTPUT_UNSAFE)


def guard_risk(work: Work) -> float:
    """What the guard's verdicts on a request say of its caller.

    In steps of a quarter: a caller is told what it weighs, and must not climb along the score.
    """
    if is_attack(work, flag_score=2.0):
        return 1.0
    verdict = work.input_verdict
    if verdict is None or _harmless(verdict.categories):
        return 0.0
    if verdict.action == pb.Verdict.ACTION_FLAG:
        return max(UNPROVEN, _step(verdict.score))
    return min(UNPROVEN, _step(verdict.score - _LET_THROUGH))


def is_attack(work: Work, *, flag_score: float) -> bool | None:
    """Whether a request was an attack: refused by the guard, flagged by it with this score, or its answer stopped.

    None where the guard did not judge all of it.
    """
    if work.error is not None and work.error.reason in _REFUSED:
        return not _harmless(filter(None, work.error.metadata.get("categories", "").split(",")))
    stopped = [v for v in work.output_verdicts if v.action == pb.Verdict.ACTION_BLOCK]
    if any(not _harmless(verdict.categories) for verdict in stopped):
        return True
    verdict = work.input_verdict
    if verdict is None:
        return None
    if verdict.action == pb.Verdict.ACTION_FLAG and verdict.score >= flag_score and not _harmless(verdict.categories):
        return True
    return False if work.outcome in ("complete", Reason.BUDGET_SPENT) else None


def _harmless(categories: Iterable[str]) -> bool:
    """Whether there are categories, and all of them are of what is no attack."""
    named = list(categories)
    return bool(named) and all(category.startswith(_NO_ATTACKS) for category in named)


def _step(score: float) -> float:
    return max(0.0, math.floor(score * 4 + 1e-6) / 4)
