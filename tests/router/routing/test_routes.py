"""From a name to a model: rules in order, arms, fallbacks, permissions, and what a configuration may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.chassis.config import ConfigError, Source
from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import RouterConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.routing.config import RouteConfig, RuleConfig, TargetConfig, follow
from meshlm.router.routing.routes import Decision, Query, Routes
from meshlm.v1 import generation_pb2 as pb
from tests.router.names import MODELS, holder, query, refused, routes, to, up


class TestRules:
    @pytest.mark.parametrize(
        ("condition", "fits", "fails"),
        [
            ({"tenants": ("t",)}, query(), query(key=holder(tenant="other"))),
            ({"keys": ("k",)}, query(), query(key=holder("other"))),
            ({"labels": {"team": "a"}}, query(labels={"team": "a", "x": "y"}), query(labels={"team": "b"})),
            ({"labels": {"team": ""}}, query(labels={"team": ""}), query()),
            ({"priorities": ("batch",)}, query(priority=pb.PRIORITY_BATCH), query(priority=pb.PRIORITY_CRITICAL)),
            ({"min_context": 11}, query(context=11), query(context=10)),
            ({"max_context": 10}, query(context=10), query(context=11)),
        ],
    )
    async def test_each_condition_fits_what_it_names_and_nothing_else(
        self, fleet: Fleet, condition: dict[str, Any], fits: Query, fails: Query
    ) -> None:
        keys = (holder(), holder("other", "other"))
        book = routes(fleet, to("large", **condition), to("small"), keys=keys)
        assert book.resolve(fits).model == "large"
        assert book.resolve(fails).model == "small"

    async def test_all_conditions_of_a_rule_must_fit(self, fleet: Fleet) -> None:
        book = routes(fleet, to("large", labels={"a": "1"}, min_context=50), to("small"))
        assert book.resolve(query(labels={"a": "1"}, context=49)).model == "small"
        assert book.resolve(query(labels={"a": "1"}, context=50)).model == "large"

    @settings(max_examples=50, deadline=None)
    @given(
        bounds=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=6),
        context=st.integers(0, 60),
    )
    async def test_the_first_rule_that_fits_decides(
        self, fleet: Fleet, bounds: list[tuple[int, int]], context: int
    ) -> None:
        rules = [to("large", min_context=min(pair), max_context=max(pair)) for pair in bounds]
        book = routes(fleet, *rules)
        first = next((n for n, pair in enumerate(bounds) if min(pair) <= context <= max(pair)), None)
        if first is None:
            assert refused(book, query(context=context)).reason == Reason.MODEL_UNKNOWN
        else:
            steps = book.resolve(query(context=context)).steps
            assert [step.outcome for step in steps if step.stage == "rule"] == [f"r: rules[{first}] fits"]

    async def test_a_request_that_no_rule_fits_has_no_model(self, fleet: Fleet) -> None:
        error = refused(routes(fleet, to("large", labels={"a": "1"})), query())
        assert (error.reason, error.metadata["route"]) == (Reason.MODEL_UNKNOWN, "r")


class TestNames:
    async def test_an_alias_of_an_alias_of_a_route_leads_to_its_rules(self, fleet: Fleet) -> None:
        book = routes(fleet, to("large"), aliases={"a": "b", "b": "r"}, default_model="a")
        decision = book.resolve(query("a"))
        assert (decision.requested, decision.model, decision.reason) == ("a", "large", "rule")
        assert (decision.steps[0].stage, decision.steps[0].outcome) == ("alias", "a is r")
        assert book.resolve(query("")).model == "large"

    async def test_a_target_may_be_an_alias(self, fleet: Fleet) -> None:
        assert routes(fleet, to("big"), aliases={"big": "large"}).resolve(query()).model == "large"

    @pytest.mark.parametrize(
        ("name", "more", "reason"),
        [("large", {}, "named"), ("a", {}, "alias"), ("", {"default_model": "a"}, "default")],
    )
    async def test_why_a_model_was_taken_is_told(
        self, fleet: Fleet, name: str, more: dict[str, Any], reason: str
    ) -> None:
        decision = routes(fleet, to("small"), aliases={"a": "large"}, **more).resolve(query(name))
        assert (decision.model, decision.reason, decision.requested) == ("large", reason, name)

    async def test_names_are_listed_only_where_they_lead_the_key_somewhere(self, fleet: Fleet) -> None:
        keys = (holder(), holder("other", "other"))
        book = routes(
            fleet, to("large", tenants=("other",)), to("new", "small"), aliases={"a": "r", "b": "large"}, keys=keys
        )
        assert book.names(holder()) == {"a": ["new", "small"], "b": ["large"], "r": ["new", "small"]}
        assert book.names(holder(models=("new",))) == {"a": ["new"], "r": ["new"]}
        assert book.names(holder("other", "other", models=("large",))) == {
            "a": ["large"],
            "b": ["large"],
            "r": ["large"],
        }


class TestSplits:
    def split(self, fleet: Fleet, **more: Any) -> Routes:
        arms = (TargetConfig(model="large", weight=50, arm="main"), TargetConfig(model="new", weight=50, arm="canary"))
        return routes(fleet, RuleConfig(targets=arms), **more)

    def arm(self, book: Routes, asked: Query) -> str:
        decision = book.resolve(asked)
        assert (decision.arm, decision.model) in {("main", "large"), ("canary", "new")}
        assert decision.reason == "split"
        return decision.arm

    async def test_a_session_stays_on_its_arm_whatever_else_differs(self, fleet: Fleet) -> None:
        one, other = self.split(fleet), self.split(fleet)
        for number in range(50):
            name = f"s{number}"
            arms = {self.arm(book, query(session=name, context=n)) for book in (one, other) for n in (1, 99)}
            assert len(arms) == 1
        assert {self.arm(one, query(session=f"s{n}")) for n in range(50)} == {"main", "canary"}

    async def test_a_key_stays_on_its_arm_whatever_its_sessions(self, fleet: Fleet) -> None:
        book = self.split(fleet, sticky="key")
        assert len({self.arm(book, query(session=f"s{n}")) for n in range(50)}) == 1
        assert len({self.arm(book, query(key=holder(f"k{n}"))) for n in range(50)}) == 2

    async def test_sessions_of_the_same_name_in_two_tenants_are_apart(self, fleet: Fleet) -> None:
        book, names = self.split(fleet), [f"s{n}" for n in range(200)]
        one = [self.arm(book, query(session=name)) for name in names]
        other = [self.arm(book, query(session=name, key=holder(tenant="u"))) for name in names]
        assert 50 < sum(a == b for a, b in zip(one, other, strict=True)) < 150

    async def test_an_arm_that_the_key_may_not_use_gets_none_of_its_requests(self, fleet: Fleet) -> None:
        book, key = self.split(fleet), holder(models=("large",))
        assert {self.arm(book, query(session=f"s{n}", key=key)) for n in range(50)} == {"main"}
        assert refused(book, query(key=holder(models=("small",)))).reason == Reason.KEY_NOT_ALLOWED


class TestFallbacks:
    async def test_the_next_model_that_is_ready_answers(self, fleet: Fleet) -> None:
        book = routes(fleet, to("large", fallbacks=("new", "small")))
        up(fleet, "large", ready=False)
        fleet.replicas[MODELS.index("new")].lose()
        decision = book.resolve(query())
        assert (decision.model, decision.reason, decision.fallbacks) == ("small", "fallback", [])
        skipped = [step.model for step in decision.steps if step.stage == "availability"]
        assert skipped == ["large", "new"]

    async def test_where_none_is_ready_the_first_choice_is_told_as_down(self, fleet: Fleet) -> None:
        for model in MODELS:
            up(fleet, model, ready=False)
        decision = routes(fleet, to("large", fallbacks=("small",))).resolve(query())
        assert (decision.model, decision.reason) == ("large", "rule")

    async def test_a_fallback_is_only_for_what_another_model_can_help(self, fleet: Fleet) -> None:
        book = routes(fleet, to("large", fallbacks=("new", "small")))
        decision = book.resolve(query())
        assert not book.fall_back(decision, MeshError(Reason.CONTEXT_TOO_LONG, "too long"))
        assert decision.model == "large"
        assert book.fall_back(decision, MeshError(Reason.OVERLOADED, "full"))
        assert (decision.model, decision.reason) == ("new", "fallback")
        assert book.fall_back(decision, MeshError(Reason.NO_REPLICA, "gone"))
        assert not book.fall_back(decision, MeshError(Reason.OVERLOADED, "full"))
        assert decision.model == "small"

    async def test_a_fallback_that_the_key_may_not_use_is_passed_over(self, fleet: Fleet) -> None:
        up(fleet, "large", ready=False)
        book = routes(fleet, to("large", fallbacks=("new", "small")))
        decision = book.resolve(query(key=holder(models=("large", "small"))))
        assert decision.model == "small"
        assert [step.model for step in decision.steps if step.stage == "permission"] == ["new"]

    async def test_a_model_that_nobody_serves_is_passed_over_and_alone_is_unknown(self, fleet: Fleet) -> None:
        assert routes(fleet, to("ghost", fallbacks=("small",))).resolve(query()).model == "small"
        assert refused(routes(fleet, to("ghost")), query()).reason == Reason.MODEL_UNKNOWN

    @pytest.mark.parametrize("resumed", [False, True])
    async def test_what_only_one_model_can_answer_must_name_it(self, fleet: Fleet, resumed: bool) -> None:
        tokens = pb.Input(token_ids=pb.TokenIds(ids=[1]))
        ask = query() if resumed else query(input=tokens)
        asked = Query(ask.generation, ask.key, ask.context, "x", resumed=resumed)
        error = refused(routes(fleet, to("large", fallbacks=("small",))), asked)
        assert (error.reason, error.metadata["field"]) == (Reason.REQUEST_INVALID, "generation.model")
        assert routes(fleet, to("large")).resolve(asked).model == "large"


class TestConfig:
    """What cannot be meant is refused at the start, with the path of it."""

    HEAD = '[[router.keys]]\nid = "k"\ntenant = "t"\nsecret_hash = "' + "0" * 64 + '"\n'

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ('[router.aliases]\na = "b"\nb = "c"\nc = "b"', "router: aliases.a: leads in a circle: a -> b -> c -> b"),
            ("[router.routes.r]\nrules = []", "router.routes.r: rules: at least one"),
            ("[[router.routes.r.rules]]\n", "router.routes.r.rules[0]: one of targets"),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m", weight = -1 }]',
                "router.routes.r.rules[0].targets[0]: weight: must be",
            ),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m", weight = 0 }, { model = "n", weight = 0 }]',
                "router.routes.r.rules[0]: targets: all weights are 0",
            ),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m" }, { model = "m" }]',
                "router.routes.r.rules[0]: targets: two arms have the name m",
            ),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m" }]\n[[router.routes.r.rules]]\n'
                'targets = [{ model = "n" }]',
                "router.routes.r: rules[1]: is never reached",
            ),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m" }]\nmin_context = 5\nmax_context = 4',
                "router.routes.r.rules[0]: max_context",
            ),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m" }]\nfallbacks = ["s"]\n'
                '[[router.routes.s.rules]]\ntargets = [{ model = "m" }]',
                "router: routes.r.rules[0].fallbacks[0]: s is a route",
            ),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m" }]\ntenants = ["u"]',
                "router: routes.r.rules[0].tenants: u: no key",
            ),
            (
                '[[router.routes.r.rules]]\ntargets = [{ model = "m" }]\n[router.prices.r]\nprompt = 1\ncompletion = 1',
                "router: r is a route: limits and prices",
            ),
            ('[[router.routes.r.rules]]\nmodels = ["m"]', "router.routes.r.rules[0].models: unknown key"),
            (
                '[router.aliases]\nr = "m"\n[[router.routes.r.rules]]\ntargets = [{ model = "m" }]',
                "router: routes.r: is an alias",
            ),
        ],
    )  # fmt: skip
    def test_it_names_the_path(self, tmp_path: Path, text: str, told: str) -> None:
        file = tmp_path / "mesh.toml"
        file.write_text(self.HEAD + text)
        with pytest.raises(ConfigError) as caught:
            Source.read(file, {}).section("router", RouterConfig)
        assert str(caught.value).startswith(told)

    @settings(max_examples=200, deadline=None)
    @given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from("abcdefg"), max_size=6))
    def test_aliases_lead_to_a_model_or_are_refused_for_their_circle(self, aliases: dict[str, str]) -> None:
        for name in aliases:
            place, steps = name, 0
            while place in aliases and steps <= len(aliases):
                place, steps = aliases[place], steps + 1
            if place in aliases:  # more steps than names: it never ends
                with pytest.raises(ValueError, match=f"aliases.{name}: leads in a circle"):
                    follow(name, aliases)
            else:
                assert follow(name, aliases) == place

    def test_a_key_whose_models_name_a_route_is_refused_for_it_could_use_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"keys\[0\]\.models: r is a route"):
            RouterConfig(keys=(holder(models=("r",)),), routes={"r": RouteConfig(rules=(to("m"),))})


def test_a_decision_tells_the_caller_all_of_its_steps() -> None:
    from meshlm.v1 import inference_pb2

    decision = Decision("r", "m", "split", "canary")
    decision.note("split", "arm canary", "m")
    told = inference_pb2.RoutingDecision()
    decision.tell(told)
    assert (told.requested, told.model_reason, told.arm) == ("r", "split", "canary")
    assert [(step.stage, step.outcome, step.model) for step in told.steps] == [("split", "arm canary", "m")]
