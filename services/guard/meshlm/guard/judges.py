"""Which model judges beside the rules, as the configuration says."""

from __future__ import annotations

from meshlm.guard.config import GuardConfig
from meshlm.guard.embedded import EmbeddedModel
from meshlm.guard.embedded_judge import EmbeddedJudge
from meshlm.guard.judging import Judge


def judge_of(config: GuardConfig) -> Judge | None:
    """None where rules judge alone. Raises ArtefactError."""
    if config.model == "rules":
        return None
    return EmbeddedJudge(EmbeddedModel.load(config.model_file), config.inline_chars)
