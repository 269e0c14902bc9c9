"""Stage 4's first half: from the name that a request asks for to the model that answers, and why.

A name is a model, an alias of one, or a route: rules in order, of which the first that fits decides. Nothing is
remembered between requests, so every router says the same of the same request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.router.replicas.fleet import Fleet, Replica
from meshlm.router.replicas.residency import ANYWHERE, Regions, Residency
from meshlm.router.routing import confidence
from meshlm.router.routing.complexity import Complexity, load
from meshlm.router.routing.confidence import Trial
from meshlm.router.routing.config import ComplexityConfig, RouteConfig, RuleConfig, ShadowConfig, follow
from meshlm.router.routing.splits import arm_of, point
from meshlm.router.routing.tasks import task_of
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import inference_pb2

# Before anything was computed, another model may answer.
_ELSEWHERE = frozenset(
    {Reason.OVERLOADED, Reason.DRAINING, Reason.NO_REPLICA, Reason.NO_REPLICA_IN_REGION, Reason.ENGINE_LOST}
)
# What a caller sets who cares how tokens are drawn.
_DRAWING = frozenset({
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias",
})  # fmt: skip
# Temperature and nucleus of a task.
_SAMPLING: dict[str, tuple[float, float | None]] = {"factual": (0.1, None), "creative": (0.8, 0.9)}
_PRIORITIES = {
    pb.PRIORITY_CRITICAL: "critical",
    pb.PRIORITY_INTERACTIVE: "interactive",
    pb.PRIORITY_STANDARD: "standard",
    pb.PRIORITY_BATCH: "batch",
}


@dataclass(frozen=True)
class Query:
    """What a rule may look at."""

    generation: pb.Generation
    key: KeyConfig
    context: int  # tokens: the prompt's estimate and the answer's limit
    request_id: str = ""
    resumed: bool = False  # goes on with an answer that some model began
    path: str = "generation.model"  # the field that names the model
    trial: bool = False  # nothing will come of it: no rule learns from it

    @property
    def bound(self) -> bool:
        """Whether only one model can be meant: token ids are of one vocabulary, and half an answer is of one model."""
        return self.resumed or self.generation.input.WhichOneof("input") == "token_ids"


@dataclass(frozen=True)
class Step:
    """One step on the way, as `RoutingStep` tells it."""

    stage: str
    outcome: str
    model: str = ""


@dataclass
class Decision:
    """The model, and how it was come to. `Routes.fall_back` moves it on."""

    requested: str
    model: str = ""
    reason: str = "named"
    arm: str = ""
    steps: list[Step] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)  # still to be tried, in this order
    regions: Regions = ANYWHERE  # where it may be answered
    shadow: ShadowConfig | None = None  # where this request is one of those that are copied
    temperature: float | None = None  # where the route sets the sampling
    top_p: float | None = None
    trial: Trial | None = None  # the small model begins, and how sure it is decides
    doubt: float | None = None  # how little sure it was

    def tell(self, told: inference_pb2.RoutingDecision) -> None:
        """Put it into what the caller is told."""
        told.requested, told.model_reason, told.arm = self.requested, self.reason, self.arm
        if self.temperature is not None:
            told.temperature = self.temperature
        if self.top_p is not None:
            told.top_p = self.top_p
        told.steps.extend(
            inference_pb2.RoutingStep(stage=step.stage, outcome=step.outcome, model=step.model) for step in self.steps
        )

    def note(self, stage: str, outcome: str, model: str = "") -> None:
        self.steps.append(Step(stage, outcome, model))


class Routes:
    """The configuration's names."""

    def __init__(self, config: RouterConfig, fleet: Fleet) -> None:
        self._fleet = fleet
        self._residency = Residency(config)
        self._default = config.default_model
        self._aliases = {name: follow(name, config.aliases) for name in config.aliases}
        self._routes = config.routes
        self._complexity = Complexity(load(), confidence.load())

    def resolve(self, query: Query) -> Decision:
        """The model that a request means.

        Raises MeshError MODEL_UNKNOWN, KEY_NOT_ALLOWED, or REQUEST_INVALID where only one model can be meant and the
        route has several.
        """
        asked = query.generation.model
        decision = Decision(asked, regions=self._residency.regions(query.key))
        name = asked or self._default
        if not asked:
            decision.reason = "default" if name else "only_model"
            decision.note("default", f"the request names no model: {name or 'the only one'}")
        end = self._aliases.get(name, name)
        if end != name:
            decision.reason = "alias" if asked else "default"
            decision.note("alias", f"{name} is {end}")
        route = self._routes.get(end)
        if route is None:
            decision.model = self._fleet.resolve(end)
            if not _may_use(query.key, decision.model):
                raise _forbidden(decision.model)
            return decision
        self._by_rule(decision, end, route, query)
        return decision

    def fall_back(self, decision: Decision, error: MeshError) -> bool:
        """Go on to the next model after `error`; False where there is none, or where it would not help."""
        if error.reason not in _ELSEWHERE:
            return False
        decision.note("availability", str(error.reason), decision.model)
        ready = next((model for model in decision.fallbacks if self._fleet.ready(model, decision.regions)), None)
        if ready is None:
            return False
        decision.fallbacks = decision.fallbacks[decision.fallbacks.index(ready) + 1 :]
        decision.model, decision.reason, decision.trial = ready, "fallback", None
        decision.note("fallback", "answers instead", ready)
        return True

    def takes_over(self, decision: Decision, source: pb.Input, logprobs: Sequence[float] | None) -> bool:
        """Whether the large model answers in place of the small one, that of its first tokens said so much; or None,
        which came too late: then the prompt's look decides. Ends the trial."""
        trial, decision.trial = decision.trial, None
        assert trial is not None  # noqa: S101
        decision.doubt = confidence.doubt_of(logprobs) if logprobs is not None else None
        if decision.doubt is not None:
            over, why = self._complexity.is_doubtful(trial.place, trial.config, source, decision.doubt)
        else:
            over, why = self._complexity.is_hard(trial.place, trial.config, source, learn=False)
            cause = "too late" if logprobs is None else "nothing to judge"
            why = f"{cause}, so the prompt's look decides: {why}"
        decision.note("confidence", why, trial.large if over else trial.small)
        if over and not self._fleet.ready(trial.large, decision.regions):
            decision.note("availability", "no replica is ready", trial.large)
            return False
        if over:
            others = [model for model in decision.fallbacks if model != trial.large]
            decision.model, decision.fallbacks = trial.large, [trial.small, *others]
        return over

    def give_back(self, decision: Decision, error: MeshError) -> None:
        """The large model's limits refuse what it was to take over: the small one answers."""
        decision.note("availability", str(error.reason), decision.model)
        decision.model, decision.reason = decision.fallbacks.pop(0), "fallback"
        decision.note("fallback", "answers instead", decision.model)

    def names(self, key: KeyConfig) -> dict[str, list[str]]:
        """Aliases and routes, with the models that they may lead this key to; none that leads it nowhere."""
        found = {}
        for name in [*self._aliases, *self._routes]:
            end = self._aliases.get(name, name)
            route = self._routes.get(end)
            models = [end] if route is None else self._reachable(route, key)
            if allowed := [model for model in dict.fromkeys(models) if _may_use(key, model)]:
                found[name] = allowed
        return found

    def _reachable(self, route: RouteConfig, key: KeyConfig) -> list[str]:
        rules = (rule for rule in route.rules if _is_for(rule, key))
        return [self._model(model) for rule in rules for _, model in rule.models()]

    def _model(self, name: str) -> str:
        return self._aliases.get(name, name)

    def _by_rule(self, decision: Decision, name: str, route: RouteConfig, query: Query) -> None:
        number = next((n for n, rule in enumerate(route.rules) if _fits(rule, query)), None)
        if number is None:
            raise MeshError(
                Reason.MODEL_UNKNOWN, "no rule of this route fits the request", metadata={"model": name, "route": name}
            )
        rule = route.rules[number]
        decision.reason = "rule"
        decision.note("rule", f"{name}: rules[{number}] fits")
        if query.bound and len({self._model(model) for _, model in rule.models()}) > 1:
            what = "resume with" if query.resumed else "send token ids to"
            raise invalid(query.path, f"this route may lead to several models: {what} one by its own name")
        chosen = self._pick(decision, name, number, query)
        order = [*chosen, *self._permitted(decision, rule.fallbacks, query.key)]
        if not order:
            raise _forbidden(self._model(next(rule.models())[1]))
        self._settle_on(decision, list(dict.fromkeys(order)), name)
        if route.sampling == "by_task" and not _sets_sampling(query.generation.sampling):
            _sample(decision, query.generation.input)
        if (shadow := route.shadow) is not None and point("shadow", name, query.request_id) < shadow.share:
            decision.shadow = replace(shadow, model=self._model(shadow.model))
            decision.note("shadow", "gets a copy once the request is over, if it has room", decision.shadow.model)

    def _pick(self, decision: Decision, name: str, number: int, query: Query) -> list[str]:
        """The rule's own choice; empty where the key may use none of it."""
        route, place = self._routes[name], f"{name}.rules[{number}]"
        rule = route.rules[number]
        if rule.complexity is not None:
            return self._by_complexity(decision, rule.complexity, place, query)
        standing = [target for target in rule.targets if target.weight > 0]
        permitted = self._permitted(decision, [target.model for target in standing], query.key)
        allowed = [target for target in standing if self._model(target.model) in permitted]
        if not allowed:
            return []
        if len(standing) == 1:
            return [self._model(allowed[0].model)]
        target = arm_of(name, _subject(route, query), allowed)
        decision.arm, decision.reason = target.name, "split"
        decision.note("split", f"arm {target.name}, sticky by {route.sticky}", self._model(target.model))
        return [self._model(target.model)]

    def _by_complexity(self, decision: Decision, config: ComplexityConfig, place: str, query: Query) -> list[str]:
        """The model that the prompt needs, then the other one: it is better than none."""
        permitted = self._permitted(decision, (config.small, config.large), query.key)
        if len(permitted) < 2:
            return permitted
        decision.reason = "complexity"
        if config.signal == "confidence" and query.generation.sampling.n <= 1:
            decision.trial = Trial(place, config, *permitted)
            why = self._complexity.outlook(place, config, query.generation.input)
            decision.note("complexity", why, permitted[0])
            return permitted
        hard, why = self._complexity.is_hard(place, config, query.generation.input, learn=not query.trial)
        decision.note("complexity", why, permitted[hard])
        return [permitted[hard], permitted[not hard]]

    def _permitted(self, decision: Decision, names: Iterable[str], key: KeyConfig) -> list[str]:
        """The models of these that the key may use."""
        models = [self._model(name) for name in names]
        for model in models:
            if not _may_use(key, model):
                decision.note("permission", "the key may not use it", model)
        return [model for model in models if _may_use(key, model)]

    def _settle_on(self, decision: Decision, order: list[str], name: str) -> None:
        """The first that can answer now; where none can, the first that there is. Raises MeshError MODEL_UNKNOWN."""
        served = [model for model in order if self._served(model)]
        for model in order:
            if model not in served:
                decision.note("availability", "no worker serves it", model)
        if not served:
            raise MeshError(
                Reason.MODEL_UNKNOWN,
                "no worker serves a model of this route",
                metadata={"model": order[0], "route": name},
            )
        ready = next((model for model in served if self._fleet.ready(model, decision.regions)), served[0])
        for model in served[: served.index(ready)]:
            decision.note("availability", "no replica is ready", model)
        decision.model = ready
        decision.fallbacks = served[served.index(ready) + 1 :]
        if ready != order[0]:
            decision.reason, decision.trial = "fallback", None
            decision.note("fallback", "answers instead", ready)

    def _served(self, model: str) -> bool:
        """False only where it is sure that no worker serves it."""
        try:
            self._fleet.resolve(model)
        except MeshError:
            return False
        return True


def _is_for(rule: RuleConfig, key: KeyConfig) -> bool:
    return (not rule.tenants or key.tenant in rule.tenants) and (not rule.keys or key.id in rule.keys)


def _fits(rule: RuleConfig, query: Query) -> bool:
    generation = query.generation
    if not _is_for(rule, query.key):
        return False
    if any(generation.labels.get(name) != value for name, value in rule.labels.items()):
        return False
    if rule.priorities and _PRIORITIES.get(generation.priority) not in rule.priorities:
        return False
    return rule.min_context <= query.context and (not rule.max_context or query.context <= rule.max_context)


def _subject(route: RouteConfig, query: Query) -> str:
    """Who stays on an arm; never shared between tenants."""
    if route.sticky == "request":
        return f"request/{query.request_id}"
    who = f"{query.key.tenant}/{query.key.id}"
    if route.sticky == "session" and query.generation.session:
        return f"session/{query.key.tenant}/{query.generation.session}"
    return f"key/{who}"


def _sets_sampling(sampling: pb.Sampling) -> bool:
    """Whether the caller said anything of how tokens are drawn; a seed is about which draw, not how."""
    return any(field.name in _DRAWING for field, _ in sampling.ListFields())


def _sample(decision: Decision, source: pb.Input) -> None:
    task = task_of(source)
    if task == "unknown":
        decision.note("sampling", "neither a fact nor an invention is surely asked for: the model's defaults")
        return
    decision.temperature, decision.top_p = _SAMPLING[task]
    nucleus = f", top_p {decision.top_p}" if decision.top_p is not None else ""
    decision.note("sampling", f"{task}: temperature {decision.temperature}{nucleus}")


def _may_use(key: KeyConfig, model: str) -> bool:
    return not key.models or model in key.models


def _forbidden(model: str) -> MeshError:
    return MeshError(Reason.KEY_NOT_ALLOWED, "this key may not use this model", metadata={"model": model})


def listed_names(
    names: Mapping[str, list[str]], models: Mapping[str, list[Replica]], default: str
) -> list[inference_pb2.Model]:
    """Aliases and routes as `ListModels` tells them: what all of their models that are served can do."""
    listed = []
    for name, targets in names.items():
        replicas = [replica for target in targets for replica in models.get(target, [])]
        served = [replica.state.model for replica in replicas if replica.state is not None]
        if served:
            listed.append(
                inference_pb2.Model(
                    name=name,
                    max_context=min(model.max_context for model in served),
                    chat=all(model.chat for model in served),
                    ready_replicas=sum(replica.usable for replica in replicas),
                    is_default=name == default,
                    targets=sorted(targets),
                )
            )
    return listed
