"""Configuration of models that judge over workers (`guard.llama_guard`, `guard.panel`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from meshlm.guard.llama.prompts import VERSIONS, Wording, version_of
from meshlm.guard.llama.verdicts import CODE

NamedVersion = Literal[
    "auto", "llama-guard-1", "llama-guard-2", "llama-guard-3", "llama-guard-3-1b", "llama-guard-4", "chat"
]


@dataclass(frozen=True)
class Asking:
    """How one model is asked, and what its numbers mean."""

    # Wording of the question. `auto`: what the model's name tells (`Llama-Guard-3-8B`), for other names `chat`: the
    # newest categories, through the model's own chat template.
    version: NamedVersion = "auto"
    # Divides the difference of the two log-probabilities, of `unsafe` and of `safe`: above 1 for a model that is too
    # sure. Above 0.
    temperature: float = 1.0
    # Added to it then: below 0 for a model that cries wolf.
    offset: float = 0.0
    # Least probability of `safe` and `unsafe` together: below it the model says something else, which is no verdict.
    # Range [0, 1).
    least_mass: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError("temperature must be above 0")
        if not math.isfinite(self.offset):
            raise ValueError("offset must be a number")
        if not 0 <= self.least_mass < 1:
            raise ValueError("least_mass must be in [0, 1)")

    def wording(self, model: str) -> Wording:
        """The version's name, for a model of that name."""
        return version_of(model).name if self.version == "auto" else VERSIONS[self.version].name


@dataclass(frozen=True)
class LlamaGuardConfig(Asking):
    """Models behind workers that judge (`guard.llama_guard`): `guard.model`, and those of `guard.panel`."""

    # Targets of the workers that serve them. `meshlm up` sets this to those that it starts.
    workers: tuple[str, ...] = ()
    # Categories to ask about instead of the version's own, e.g. { S1 = "Violent Crimes.\nMore about it" }; codes are
    # S or O and a number.
    categories: Mapping[str, str] = field(default_factory=dict)
    # Codes of categories that are not asked about.
    excluded: tuple[str, ...] = ()
    # Score from which the model is asked for categories as well: no more than the least score at which a policy flags.
    # Range (0, 1].
    category_score: float = 0.3
    # Characters that are judged at a time; longer texts in parts that overlap, side by side.
    segment_chars: int = 6_000
    # Characters of the conversation before it that are read along, the latest.
    context_chars: int = 6_000
    # Prompts at the workers at a time, over all texts.
    parallel: int = 16
    # Who shares the prefix cache of the prompt's fixed part. `tenant`: a tenant's texts alone; `all` computes it once,
    # but a tenant could tell from the time a verdict takes whether another sent a text that begins alike.
    prefix_cache: Literal["tenant", "all"] = "tenant"
    # Seconds a worker may take for one answer, before another one is asked.
    timeout_seconds: float = 3.0
    # Workers asked, one after the other, before the model counts as unable to judge.
    attempts: int = 2
    # Failures of a worker, one behind the other, after which it is left alone for a while.
    breaker_failures: int = 3
    # Seconds for which it is; each time in a row twice as long, up to 8 times.
    breaker_seconds: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for code in self.categories:
            if not CODE.fullmatch(code):
                raise ValueError(f"categories: {code!r} is not S or O and a number from 1 to 99")
        if not 0 < self.category_score <= 1:
            raise ValueError("category_score must be in (0, 1]")
        for name in ("segment_chars", "parallel", "timeout_seconds", "attempts", "breaker_failures", "breaker_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        if self.context_chars < 0:
            raise ValueError("context_chars must be at least 0")


@dataclass(frozen=True)
class Verifier(Asking):
    """A model of another family that judges again (`guard.panel.second`, `guard.panel.third`)."""

    # Name of the model that a worker of `guard.llama_guard.workers` serves; empty: none.
    model: str = ""


@dataclass(frozen=True)
class PanelConfig:
    """When others judge again whether a text is harmful (`guard.panel`)."""

    # Asked where the first model is unsure, and in a sample. Of another family, or it errs where the first does.
    second: Verifier = field(default_factory=Verifier)
    # Asked where the first two disagree; its vote decides.
    third: Verifier = field(default_factory=Verifier)
    # Scores of the first model between which it is unsure. Range [0, 1], low first.
    low: float = 0.3
    high: float = 0.7
    # Share of the other answers that are judged again. Range [0, 1].
    sample_share: float = 0.01
    # Score from which a model votes `unsafe`. Range (0, 1].
    unsafe_score: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError("expected 0 <= low <= high <= 1")
        if not 0 <= self.sample_share <= 1:
            raise ValueError("sample_share must be in [0, 1]")
        if not 0 < self.unsafe_score <= 1:
            raise ValueError("unsafe_score must be in (0, 1]")
        if self.third.model and not self.second.model:
            raise ValueError("third: needs a second")
        if self.second.model and self.second.model == self.third.model:
            raise ValueError("second and third must be different models")
