"""Texts of others in an input: judged apart from its speakers' own, for an order in a document is an attack.

Signatures refuse from a lower score there (`indirect_block_score`), for nobody has reason to order a model about in a
document, while people do talk about such things. The model's opinion needs a higher one: trained on what callers
write, the embedded model takes technical prose for attacks, see docs/guard.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from meshlm.guard.config import PolicyConfig
from meshlm.guard.judging import Turn
from meshlm.v1 import generation_pb2

CATEGORY = "injection.indirect"
_ATTACKS = ("injection", "jailbreak")
_SEVERITY = tuple(
    map(generation_pb2.Verdict.Action.Value, ("ACTION_ALLOW", "ACTION_FLAG", "ACTION_REDACT", "ACTION_BLOCK"))
)


def split(turns: Sequence[Turn]) -> tuple[list[Turn], list[Turn]]:
    """The turns, to be judged for what their speakers say; and again, for what they bring along. The second is empty
    where that is nothing."""
    own = [dataclasses.replace(turn, judged=False) if turn.untrusted else turn for turn in turns]
    if not any(turn.untrusted and turn.judged and turn.text for turn in turns):
        return own, []
    return own, [turn if turn.untrusted else dataclasses.replace(turn, judged=False) for turn in turns]


def thresholds(config: PolicyConfig) -> PolicyConfig:
    """The policy for texts of others. What follows from `injection.indirect` follows from all attacks in them."""
    act = config.actions.get(CATEGORY)
    return dataclasses.replace(
        config,
        actions=config.actions if act is None else {**config.actions, **dict.fromkeys(_ATTACKS, act)},
        flag_score=config.indirect_flag_score,
        block_score=config.indirect_block_score,
        attack_flag_score=config.indirect_attack_flag_score,
        attack_block_score=config.indirect_attack_block_score,
    )


def merged(own: generation_pb2.Verdict, others: generation_pb2.Verdict) -> generation_pb2.Verdict:
    """One verdict on both. Its score and range are those of the one that decides."""
    if any(category.partition(".")[0] in _ATTACKS for category in others.categories):
        others.categories.append(CATEGORY)
    weaker, verdict = sorted((own, others), key=lambda v: (_SEVERITY.index(v.shadow_action or v.action), v.score))
    made = generation_pb2.Verdict()
    made.CopyFrom(verdict)
    del made.categories[:], made.detectors[:]
    made.categories.extend(sorted({*own.categories, *others.categories}))
    made.detectors.extend(dict.fromkeys([*weaker.detectors, *verdict.detectors]))
    return made
