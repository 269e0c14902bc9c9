"""Configuration of routes (section `router.routes.<name>`): names that lead to a model by rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

PriorityName = Literal["critical", "interactive", "standard", "batch"]


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """A model that a rule may lead to."""

    # The model's own name, or an alias of it.
    model: str
    # Its part of the traffic, relative to the rule's other targets; 0: none.
    weight: float = 1.0
    # Name of this arm of the split, in decisions, metrics and the log; empty: the model's.
    arm: str = ""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: must not be empty")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError("weight: must be a number of at least 0")

    @property
    def name(self) -> str:
        """The arm's."""
        return self.arm or self.model


@dataclass(frozen=True, kw_only=True)
class ComplexityConfig:
    """A choice between a small and a large model by how hard the prompt is."""

    # The small model's own name, or an alias of it.
    small: str
    # The large model's own name, or an alias of it.
    large: str
    # What tells how hard it is: `prompt`, its look; or `confidence`, how sure the small model is of the first tokens of
    # its answer, which are held back until then. Where that cannot be known, the prompt's look decides.
    signal: Literal["prompt", "confidence"] = "prompt"
    # With `confidence`: so many first tokens are judged, or the whole answer where it is shorter. Range [1, 512].
    first_tokens: int = 16
    # With `confidence`: seconds that they may take at the small model before the prompt's look decides.
    first_seconds: float = 5.0
    # Part of the requests that the small model is to answer. Range [0, 1].
    small_share: float = 0.8
    # Score above which the large model answers, range [0, 1]; unset: the one that gives `small_share`.
    threshold: float | None = None
    # What that is found on: `training`, questions that the scorer learned from, the same in every router; `recent`, the
    # last requests that this router saw under the rule; or `similar`, those of them whose prompts look most like this
    # one's, with `confidence` only.
    calibration: Literal["training", "recent", "similar"] = "training"

    def __post_init__(self) -> None:
        if not self.small or not self.large:
            raise ValueError("small and large: must not be empty")
        if self.small == self.large:
            raise ValueError("small and large: are the same model")
        if not 0 <= self.small_share <= 1:
            raise ValueError("small_share: must be in [0, 1]")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError("threshold: must be in [0, 1]")
        if self.calibration == "similar" and self.signal != "confidence":
            raise ValueError("calibration: similar is for the signal confidence")
        if not 1 <= self.first_tokens <= 512:
            raise ValueError("first_tokens: must be in [1, 512]")
        if not (math.isfinite(self.first_seconds) and self.first_seconds > 0):
            raise ValueError("first_seconds: must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """For which requests, and which models then. What is left empty fits every request."""

    # The key's tenant is one of these.
    tenants: tuple[str, ...] = ()
    # The key is one of these, by id.
    keys: tuple[str, ...] = ()
    # The request has all of these labels, with these values.
    labels: dict[str, str] = field(default_factory=dict)
    # The request's priority, after the key's limit on it, is one of these.
    priorities: tuple[PriorityName, ...] = ()
    # Least tokens of context: the prompt's estimate and `max_tokens` together.
    min_context: int = 0
    # Most tokens of context; 0: any.
    max_context: int = 0
    # Models that share its traffic by weight.
    targets: tuple[TargetConfig, ...] = ()
    # Instead of targets: a choice by how hard the prompt is.
    complexity: ComplexityConfig | None = None
    # Models that answer, in this order, where the chosen one is down or overloaded.
    fallbacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.targets) == (self.complexity is not None):
            raise ValueError("one of targets and complexity is required")
        if self.targets and not any(target.weight for target in self.targets):
            raise ValueError("targets: all weights are 0")
        arms = Counter(target.name for target in self.targets)
        if twice := [arm for arm, count in arms.items() if count > 1]:
            raise ValueError(f"targets: two arms have the name {twice[0]}")
        if self.min_context < 0 or self.max_context < 0:
            raise ValueError("min_context and max_context: cannot be negative")
        if self.max_context and self.max_context < self.min_context:
            raise ValueError("max_context: is below min_context")

    def models(self) -> Iterator[tuple[str, str]]:
        """Every model named here, with the field that names it."""
        for number, target in enumerate(self.targets):
            yield f"targets[{number}].model", target.model
        if self.complexity is not None:
            yield "complexity.small", self.complexity.small
            yield "complexity.large", self.complexity.large
        for number, model in enumerate(self.fallbacks):
            yield f"fallbacks[{number}]", model

    @property
    def unconditional(self) -> bool:
        """Whether it fits every request."""
        conditions = (self.tenants, self.keys, self.labels, self.priorities, self.min_context, self.max_context)
        return not any(conditions)


@dataclass(frozen=True, kw_only=True)
class ShadowConfig:
    """A model that gets copies of requests; nobody sees its answers, and no caller pays for them."""

    # The model's own name, or an alias of it.
    model: str
    # Part of the requests that are copied. Range [0, 1].
    share: float
    # Most copies in progress at a time, in one router; what comes while so many run is not copied.
    concurrency: int = 4
    # Most tokens of a copy's answer, and the request's own limit where that is less.
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: must not be empty")
        if not 0 <= self.share <= 1:
            raise ValueError("share: must be in [0, 1]")
        if self.concurrency < 1 or self.max_tokens < 1:
            raise ValueError("concurrency and max_tokens: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class RouteConfig:
    """A name to ask for, and what it leads to: the first rule that fits decides."""

    # In the order in which they are tried.
    rules: tuple[RuleConfig, ...]
    # What stays on one arm of a split: a `session` (the key, where a request names none), a `key`, or only a `request`.
    sticky: Literal["session", "key", "request"] = "session"
    # Copies of its requests for another model.
    shadow: ShadowConfig | None = None
    # Sampling of requests that set none of it: `caller` leaves the model's defaults, `by_task` draws at temperature 0.1
    # where a fact is asked for, and at 0.8 within the nucleus of 0.9 where something is to be invented.
    sampling: Literal["caller", "by_task"] = "caller"

    def __post_init__(self) -> None:
        if not self.rules:
            raise ValueError("rules: at least one is required")
        for number, rule in enumerate(self.rules[:-1]):
            if rule.unconditional:
                raise ValueError(f"rules[{number + 1}]: is never reached, for rules[{number}] fits every request")

    def models(self) -> Iterator[tuple[str, str]]:
        """Every model named here, with the path of the field that names it."""
        for number, rule in enumerate(self.rules):
            for path, model in rule.models():
                yield f"rules[{number}].{path}", model
        if self.shadow is not None:
            yield "shadow.model", self.shadow.model


def check_names(aliases: Mapping[str, str], routes: Mapping[str, RouteConfig]) -> None:
    """Raises ValueError with the path of a name that leads in a circle, or is two things at once."""
    for name in aliases:
        follow(name, aliases)
    for name, route in routes.items():
        if name in aliases:
            raise ValueError(f"routes.{name}: is an alias, too")
        for path, model in route.models():
            if (end := follow(model, aliases)) in routes:
                raise ValueError(f"routes.{name}.{path}: {end} is a route, and not a model")


def check_callers(routes: Mapping[str, RouteConfig], tenants: set[str], keys: set[str]) -> None:
    """Raises ValueError with the path of a rule for somebody who is not there."""
    for name, route in routes.items():
        for number, rule in enumerate(route.rules):
            for kind, named, known in (("tenants", rule.tenants, tenants), ("keys", rule.keys, keys)):
                if strangers := set(named) - known:
                    what = "no key is of this tenant" if kind == "tenants" else "there is no such key"
                    raise ValueError(f"routes.{name}.rules[{number}].{kind}: {min(strangers)}: {what}")


def follow(name: str, aliases: Mapping[str, str]) -> str:
    """What a name means in the end: a model or a route. Raises ValueError where aliases lead in a circle."""
    path = [name]
    while path[-1] in aliases:
        if (after := aliases[path[-1]]) in path:
            raise ValueError(f"aliases.{name}: leads in a circle: {' -> '.join([*path, after])}")
        path.append(after)
    return path[-1]
