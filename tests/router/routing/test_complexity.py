"""Small or large: what is seen of a prompt, how a wanted share becomes a threshold, and what a rule makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.chassis.config import ConfigError, Source
from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import RouterConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.routing.complexity import FEATURES, Complexity, Scorer, features, load, parse
from meshlm.router.routing.confidence import Doubts
from meshlm.router.routing.config import ComplexityConfig, RuleConfig
from meshlm.router.routing.quantiles import Recent, Similar, quantiles_of
from meshlm.v1 import generation_pb2 as pb
from tests.router.names import holder, query, routes, up

# Only the number of numbers counts: 0.5 without one, 0.75 with one, 1 from three on.
NUMBERS = Scorer("numbers", tuple(0.5 * (name == "numbers") for name in FEATURES), 0.0, (0.0, 0.5, 0.5, 0.5, 1.0))
DOUBTS = Doubts("answers", (0.0, 0.1, 0.2, 0.3, 0.4, 1.0))
PAIR = {"small": "small", "large": "large"}


def seen(text: str, *before: str) -> dict[str, float]:
    turns = [pb.Message(role="user", content=content) for content in (*before, text)]
    return dict(zip(FEATURES, features(pb.Input(chat=pb.Chat(messages=turns))), strict=True))


def prompt(text: str) -> pb.Input:
    return pb.Input(prompt=text)


class TestFeatures:
    @pytest.mark.parametrize(
        ("name", "text", "count"),
        [
            ("numbers", "3 apples, 1,200 pears and 2.5 plums", 3),
            ("numerals", "Seven red and two green", 2),
            ("maths", "x = 3 + 4", 2),
            ("code", "```\ndef f(): return 1\n```", 4),
            ("lookup_words", "Who wrote it, and when?", 2),
            ("reasoning_words", "Why? Explain step by step.", 3),
            ("quantity_words", "How many are left over?", 2),
            ("negations", "All except what isn't", 2),
            ("options", "Which?\nA. one\nB. two", 2),
            ("items", "- one\n- two\n3. three", 3),
            ("questions", "What? Why?", 2),
            ("sentences", "One. Two! Three", 2),
            ("names", "when Paris met Berlin", 2),
        ],
    )
    def test_each_counts_what_it_is_named_after(self, name: str, text: str, count: int) -> None:
        assert seen(text)[name] == pytest.approx(np.log2(1 + count))

    def test_only_the_last_message_and_the_number_of_turns_count(self) -> None:
        after = seen("Hi", "def f(): 1 + 2", "more")
        assert after == {**seen("Hi"), "turns": pytest.approx(np.log2(3))}

    def test_shares_are_of_words(self) -> None:
        assert seen("extraordinary words")["words_of_9_letters"] == 0.5
        assert seen("слово word")["other_scripts"] == 0.5

    def test_the_middle_of_a_long_text_is_not_read(self) -> None:
        assert seen("a " * 1000 + "7 " * 5000 + "b " * 1000)["numbers"] == 0
        assert seen("7 " * 1000 + "a " * 5000)["numbers"] > 9

    @settings(max_examples=100, deadline=None)
    @given(st.text())
    def test_any_text_has_a_score_between_0_and_1(self, text: str) -> None:
        for scorer in (NUMBERS, load()):
            assert 0 <= scorer.score(prompt(text)) <= 1

    def test_token_ids_are_scored_as_an_empty_text(self) -> None:
        assert features(pb.Input(token_ids=pb.TokenIds(ids=[1]))) == features(prompt(""))


class TestThresholds:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=2, max_size=300), st.floats(0, 1))
    def test_it_is_the_quantile_of_what_was_learned_from(self, scores: list[float], share: float) -> None:
        scorer = Scorer("x", (), 0.0, tuple(quantiles_of(scores)))
        assert list(scorer.quantiles) == pytest.approx(np.quantile(scores, np.linspace(0, 1, 101)), abs=1e-9)
        below = np.floor(share * 100) / 100
        assert scorer.threshold(below) == pytest.approx(np.quantile(scores, below), abs=1e-9)

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(0, 1), min_size=100, max_size=1500, unique=True), st.sampled_from([0.1, 0.5, 0.8, 0.99]))
    def test_of_recent_prompts_the_wanted_share_is_small(self, scores: list[float], share: float) -> None:
        recent = Recent()
        for score in scores:
            recent.note(score)
        threshold = recent.threshold(share)
        assert threshold is not None
        kept = scores[-1000:]
        assert sum(score <= threshold for score in kept) == round(share * len(kept))

    def test_a_few_prompts_say_nothing(self) -> None:
        recent = Recent()
        for _ in range(99):
            recent.note(0.9)
        assert recent.threshold(0.8) is None

    def test_traffic_that_is_harder_than_the_questions_moves_the_threshold_only_where_it_is_asked_to(self) -> None:
        book = Complexity(NUMBERS, DOUBTS)
        fixed, moving = ComplexityConfig(**PAIR), ComplexityConfig(**PAIR, calibration="recent")
        texts = ["1" if number % 10 else "1 2 3" for number in range(200)]  # all have numbers, a tenth has three
        hard = {"training": 0, "recent": 0}
        for text in texts:
            hard["training"] += book.is_hard("a", fixed, prompt(text), learn=True)[0]
            hard["recent"] += book.is_hard("b", moving, prompt(text), learn=True)[0]
        assert hard["training"] == 200  # above 80% of the questions' scores, every one
        last = [book.is_hard("b", moving, prompt(text), learn=False)[0] for text in texts]
        assert sum(last) == 20
        assert "recent" in book.is_hard("b", moving, prompt("1"), learn=False)[1]

    def test_similar_requests_are_compared_with_each_other_and_each_kind_keeps_the_share(self) -> None:
        book = Complexity(NUMBERS, DOUBTS)
        config = ComplexityConfig(**PAIR, signal="confidence", calibration="similar", small_share=0.75)
        chance = np.random.default_rng(1)
        over: dict[str, list[bool]] = {"Who?": [], "1 + 2 + 3 = ": []}
        for _ in range(1500):
            for text, low in (("Who?", 0.1), ("1 + 2 + 3 = ", 0.7)):  # the doubts of one are all above the other's
                taken, why = book.is_doubtful("r", config, prompt(text), low + 0.2 * chance.random())
                over[text].append(taken)
        assert "75% of similar requests are small" in why
        for taken in over.values():
            assert 0.2 < np.mean(taken[500:]) < 0.3

    @settings(max_examples=30, deadline=None)
    @given(st.floats(0.02, 0.98), st.integers(0, 2**32 - 1))
    def test_the_next_of_those_alike_is_small_with_the_wanted_probability(self, share: float, seed: int) -> None:
        chance, similar = np.random.default_rng(seed), Similar(1)
        for score in chance.random(1000):
            similar.note([1.0], score)
        threshold = similar.threshold([1.0], share)
        assert threshold is not None
        nearest = max(20, np.ceil(2 / min(share, 1 - share)))
        assert abs(threshold - share) < 5 * np.sqrt(share * (1 - share) / nearest)

    def test_what_is_only_tried_teaches_nothing(self) -> None:
        book, config = Complexity(NUMBERS, DOUBTS), ComplexityConfig(**PAIR, calibration="recent")
        for _ in range(500):
            book.is_hard("r", config, prompt("1"), learn=False)
        assert "questions" not in book.is_hard("r", config, prompt("1"), learn=False)[1]
        assert "of numbers" in book.is_hard("r", config, prompt("1"), learn=False)[1]

    @pytest.mark.parametrize(("share", "hard"), [(0.0, True), (1.0, False)])
    def test_all_or_none_is_all_or_none_whatever_the_score(self, share: float, hard: bool) -> None:
        config = ComplexityConfig(**PAIR, small_share=share)
        for text in ("", "1 2 3"):
            assert Complexity(NUMBERS, DOUBTS).is_hard("r", config, prompt(text), learn=True)[0] is hard

    def test_a_threshold_of_ones_own_wins_over_the_share(self) -> None:
        config = ComplexityConfig(**PAIR, threshold=0.7)
        answers = [Complexity(NUMBERS, DOUBTS).is_hard("r", config, prompt(text), learn=True) for text in ("", "1")]
        assert [hard for hard, _ in answers] == [False, True]
        assert answers[1][1] == "score 0.750 above 0.700 (as configured)"


class TestArtefact:
    def test_the_shipped_scorer_is_of_these_features(self) -> None:
        scorer = load()
        assert len(scorer.weights) == len(FEATURES)
        assert list(scorer.quantiles) == sorted(scorer.quantiles)
        assert 0 <= scorer.quantiles[0] < scorer.quantiles[-1] <= 1

    def test_one_that_was_learned_on_others_is_refused(self) -> None:
        found = {"version": "x", "weights": {"length": 1.0}, "bias": 0, "quantiles": [0, 1]}
        with pytest.raises(ValueError, match="other features"):
            parse(json.loads(json.dumps(found)))


class TestRules:
    RULE = RuleConfig(complexity=ComplexityConfig(**PAIR, threshold=0.5), fallbacks=("new",))

    @pytest.fixture
    def easy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("meshlm.router.routing.routes.load", lambda: NUMBERS)

    def asks(self, text: str, **more: object) -> object:
        chat = pb.Chat(messages=[pb.Message(role="user", content=text)])
        return query(input=pb.Input(chat=chat), **more)

    @pytest.mark.usefixtures("easy")
    async def test_hard_prompts_go_to_the_large_model_and_the_decision_says_by_how_much(self, fleet: Fleet) -> None:
        book = routes(fleet, self.RULE)
        decisions = [book.resolve(self.asks(text)) for text in ("no number", "1 2 3")]
        assert [(d.model, d.reason, d.arm) for d in decisions] == [
            ("small", "complexity", ""),
            ("large", "complexity", ""),
        ]
        step = next(step for step in decisions[1].steps if step.stage == "complexity")
        assert (step.model, step.outcome) == ("large", "score 1.000 above 0.500 (as configured)")

    @pytest.mark.usefixtures("easy")
    async def test_where_the_chosen_one_is_down_the_other_answers_and_then_the_fallbacks(self, fleet: Fleet) -> None:
        book = routes(fleet, self.RULE)
        up(fleet, "large", ready=False)
        decision = book.resolve(self.asks("1 2 3"))
        assert (decision.model, decision.reason, decision.fallbacks) == ("small", "fallback", ["new"])
        assert book.fall_back(decision, MeshError(Reason.OVERLOADED, "full"))
        assert decision.model == "new"

    @pytest.mark.usefixtures("easy")
    async def test_a_key_that_may_use_only_one_of_them_gets_that_one(self, fleet: Fleet) -> None:
        book = routes(fleet, self.RULE)
        decision = book.resolve(self.asks("1 2 3", key=holder(models=("small",))))
        assert (decision.model, decision.reason) == ("small", "rule")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('complexity = { small = "m", large = "m" }', "rules[0].complexity: small and large: are the same"),
        ('complexity = { small = "m", large = "n", small_share = 1.5 }', "rules[0].complexity: small_share: must"),
        ('complexity = { small = "m", large = "n", threshold = -1 }', "rules[0].complexity: threshold: must"),
        (
            'complexity = { small = "m", large = "n", calibration = "similar" }',
            "rules[0].complexity: calibration: similar",
        ),
        ('complexity = { small = "m", large = "n", first_tokens = 0 }', "rules[0].complexity: first_tokens: must"),
        ('complexity = { small = "m", large = "n", first_seconds = 0.0 }', "rules[0].complexity: first_seconds: must"),
        ('complexity = { small = "m" }', "rules[0].complexity.large: required"),
        ('complexity = { small = "m", large = "n" }\ntargets = [{ model = "m" }]', "rules[0]: one of targets"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused_with_its_path(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(f"[[router.routes.r.rules]]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        Source.read(file, {}).section("router", RouterConfig)
    assert str(caught.value).startswith(f"router.routes.r.{told}")
