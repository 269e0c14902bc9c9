"""Who is asked again, and what several votes come to."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from meshlm.guard.combined import CombinedJudge, Member
from meshlm.guard.judging import Head, JudgeError, Opinion, Turn
from meshlm.guard.llama.config import PanelConfig, Verifier
from meshlm.guard.panel import DISPUTED, Panel

TURNS = [Turn("user", "a secret cake")]
SCORES = st.floats(0, 1)


class Stub:
    """Has one opinion of everything; None cannot judge."""

    def __init__(self, name: str, score: float | None, *categories: str, attack: float | None = None) -> None:
        self.version = name
        self.score, self.categories, self.attack = score, categories, attack
        self.asked: list[tuple[Head, ...]] = []

    async def judge_prompt(
        self, turns: Sequence[Turn], heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        self.asked.append(tuple(heads))
        if self.score is None:
            raise JudgeError("down")
        scores = {"attack": self.attack, "harm": self.score}
        return [
            Opinion(f"{self.version}/{head}", head, score, self.categories)
            for head in heads
            if (score := scores[head]) is not None
        ]

    async def judge_answer(
        self, turns: Sequence[Turn], answer: str, heads: Sequence[Head], *, tenant: str, request_id: str
    ) -> list[Opinion]:
        return await self.judge_prompt(turns, heads, tenant=tenant, request_id=request_id)


def panel(first: Stub, second: Stub, third: Stub | None = None, **config: float) -> Panel:
    return Panel(first, second, third, PanelConfig(**({"sample_share": 0.0} | config)))  # type: ignore[arg-type]


async def harm(made: Panel) -> Opinion:
    opinions = await made.judge_prompt(TURNS, ("attack", "harm"), tenant="t", request_id="r")
    return next(opinion for opinion in opinions if opinion.head == "harm")


@pytest.mark.parametrize("score", [0.0, 0.29, 0.71, 1.0])
async def test_a_model_that_is_sure_is_believed(score: float) -> None:
    second = Stub("b", 0.5)
    assert (await harm(panel(Stub("a", score, "S1"), second))) == Opinion("a/harm", "harm", score, ("S1",))
    assert second.asked == []


async def test_two_that_agree_decide_without_the_third() -> None:
    first, second, third = Stub("a", 0.6), Stub("b", 0.9, "S2"), Stub("c", 0.0)
    opinion = await harm(panel(first, second, third))
    assert opinion.score == pytest.approx(0.75)
    assert opinion.categories == ("S2",)
    assert opinion.detector == "panel:agreed(a/harm=0.60,b/harm=0.90)"
    assert third.asked == []
    assert second.asked == [("harm",)]


@pytest.mark.parametrize(("third", "score", "categories"), [(0.1, 0.4, ()), (0.95, 0.9, ("S2",)), (0.5, 0.5, ("S2",))])
async def test_a_third_vote_decides_where_two_disagree(third: float, score: float, categories: tuple[str, ...]) -> None:
    voters = (Stub("a", 0.4), Stub("b", 0.9, "S2"), Stub("c", third))
    with capture_logs() as logs:
        opinion = await harm(panel(*voters))
    assert (opinion.score, opinion.categories) == (score, categories)
    assert opinion.detector.startswith("panel:decided(a/harm=0.40,b/harm=0.90,c/harm=")
    (told,) = logs
    assert (told["event"], told["outcome"], told["request_id"]) == ("judging models disagree", "decided", "r")
    assert "secret" not in str(logs)


@pytest.mark.parametrize("third", [None, Stub("c", None)])
async def test_without_a_third_vote_a_dispute_is_held(third: Stub | None) -> None:
    opinion = await harm(panel(Stub("a", 0.4), Stub("b", 0.9), third))
    assert (opinion.score, opinion.categories) == (1.0, (DISPUTED,))
    assert opinion.detector.startswith("panel:held(")


async def test_a_held_text_is_told_with_what_the_one_who_objects_says() -> None:
    assert (await harm(panel(Stub("a", 0.6, "S3"), Stub("b", 0.1)))).categories == ("S3",)


async def test_an_unsure_verdict_without_its_second_is_none() -> None:
    with pytest.raises(JudgeError):
        await harm(panel(Stub("a", 0.5), Stub("b", None)))


async def test_a_first_model_that_is_down_is_an_error_whoever_else_is_up() -> None:
    with pytest.raises(JudgeError):
        await harm(panel(Stub("a", None), Stub("b", 0.1)))


async def test_a_share_of_answers_is_judged_again_all_windows_of_each() -> None:
    first, second = Stub("a", 0.0), Stub("b", 0.0)
    made = panel(first, second, sample_share=0.2)
    sampled = set()
    for number in range(1_000):
        for _ in range(2):
            before = len(second.asked)
            await made.judge_answer(TURNS, "x", ("harm",), tenant="t", request_id=f"r{number}")
            sampled |= {number} if len(second.asked) > before else set()
    assert len(second.asked) == 2 * len(sampled)
    assert 140 < len(sampled) < 260
    await harm(made)
    assert len(second.asked) == 2 * len(sampled)  # prompts are not sampled


async def test_a_sampled_answer_goes_on_where_the_second_is_down() -> None:
    made = panel(Stub("a", 0.1), Stub("b", None), sample_share=1.0)
    (opinion,) = await made.judge_answer(TURNS, "x", ("harm",), tenant="t", request_id="r")
    assert (opinion.score, opinion.detector) == (0.1, "panel:skipped(a/harm=0.10)")


async def test_a_sampled_answer_that_others_object_to_is_stopped_by_most_of_them() -> None:
    made = panel(Stub("a", 0.1), Stub("b", 0.9, "S1"), Stub("c", 0.8, "S2"), sample_share=1.0)
    (opinion,) = await made.judge_answer(TURNS, "x", ("harm",), tenant="t", request_id="r")
    assert (opinion.score, opinion.categories) == (0.8, ("S1",))


@given(st.lists(SCORES, min_size=3, max_size=3), SCORES.filter(lambda score: score > 0))
async def test_the_score_lies_on_the_side_of_most_votes(scores: list[float], unsafe_score: float) -> None:
    voters = [Stub(name, score) for name, score in zip("abc", scores, strict=True)]
    made = panel(voters[0], voters[1], voters[2], low=0.0, high=1.0, unsafe_score=unsafe_score)
    opinion = await harm(made)
    votes = scores if voters[2].asked else scores[:2]
    assert (opinion.score >= unsafe_score) == (sum(vote >= unsafe_score for vote in votes) > len(votes) / 2)
    if len(votes) == 3:
        assert opinion.score == median(votes)


async def test_attacks_are_left_to_those_who_know_them() -> None:
    first, second = Stub("a", 0.5, attack=0.9), Stub("b", 0.1)
    made = panel(first, second, Stub("c", 0.1))
    opinions = await made.judge_prompt(TURNS, ("attack", "harm"), tenant="t", request_id="r")
    assert {o.head: o.score for o in opinions} == {"attack": 0.9, "harm": 0.1}


async def test_several_judges_are_asked_what_each_is_for_and_the_highest_counts() -> None:
    one, two, three = Stub("a", 0.3, attack=0.2), Stub("b", 0.6, attack=0.9), Stub("c", 0.5, attack=0.4)
    made = CombinedJudge([Member(one, ("attack",)), Member(two, ("harm",)), Member(three, ("attack", "harm"))])
    opinions = await made.judge_prompt(TURNS, ("attack", "harm"), tenant="t", request_id="r")
    assert {o.head: (o.detector, o.score) for o in opinions} == {"attack": ("c/attack", 0.4), "harm": ("b/harm", 0.6)}
    await made.judge_answer(TURNS, "x", ("harm",), tenant="t", request_id="r")
    assert one.asked == [("attack",)]
    assert made.version == "a+b+c"


async def test_where_one_of_several_cannot_judge_none_can() -> None:
    made = CombinedJudge([Member(Stub("a", 0.1, attack=0.1), ("attack",)), Member(Stub("b", None), ("harm",))])
    with pytest.raises(JudgeError):
        await made.judge_prompt(TURNS, ("attack", "harm"), tenant="t", request_id="r")


@pytest.mark.parametrize(
    "fields",
    [
        {"low": 0.8, "high": 0.2},
        {"sample_share": 1.5},
        {"unsafe_score": 0.0},
        {"third": Verifier(model="x")},
        {"second": Verifier(model="x"), "third": Verifier(model="x")},
    ],
)
def test_a_panel_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"expected|must|needs"):
        PanelConfig(**fields)  # type: ignore[arg-type]
