"""How surprising texts are: the statistic, the n-gram estimate, and a model's score beside a request."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import math
import random
import string
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.risk.config import EntropyConfig, RampConfig, RiskConfig
from meshlm.router.risk.ngrams import BACKOFF_FROM, ENTROPY_NATS, NATS, ORDER, ByteModel, load, places
from meshlm.router.risk.surprise import WINDOW, Estimator, Surprise, ends_of, peak, risk_of
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from tests.router.calls import collect, failure
from tests.router.mesh import Mesh, key
from tests.waiting import until

PROSE = (
    "The harbour lay quiet in the early morning, and only two of the smaller boats had gone out. On the pier a man "
    "mended his nets, as he had done every day for the last forty years, and did not look up when we passed him."
)
GERMAN = (
    "Der Hafen lag am frühen Morgen still da, und nur zwei der kleineren Boote waren hinausgefahren. Auf dem Steg "
    "flickte ein Mann seine Netze, wie er es seit vierzig Jahren jeden Tag getan hatte."
)
RUSSIAN = "Рано утром гавань была тиха, и только две лодки вышли в море. На причале старик чинил свои сети."
CHINESE = "清晨的港口很安静,只有两艘小船出海。码头上有一个人在修补渔网,四十年来他每天都这样做,我们走过时他没有抬头。"
CODE = (
    "def total(rows: list[Row]) -> float:\n    return sum(row.price * row.count for row in rows if not row.deleted)\n"
    * 2
)
BASE64 = base64.b64encode(random.Random(1).randbytes(300)).decode()
IDS = "\n".join(f"{random.Random(i).getrandbits(128):032x}" for i in range(9))


def noise(seed: int, length: int = 200) -> str:
    return "".join(random.Random(seed).choices(string.printable[:95], k=length))


@pytest.fixture(scope="module")
def estimator() -> Estimator:
    return Estimator()


class TestPeak:
    def test_a_short_burst_in_a_long_text_counts_in_full(self) -> None:
        surprisal = [3.0] * 1000
        surprisal[500:516] = [9.0] * 16
        assert peak(surprisal, [3.0] * 1000, 16) == pytest.approx(6.0)

    def test_what_was_as_open_as_it_was_surprising_is_no_surprise(self) -> None:
        assert peak([8.0] * 40, [8.0] * 40, 16) == 0.0

    @given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 10)), min_size=1, max_size=60))
    def test_it_is_the_largest_mean_of_a_window(self, tokens: list[tuple[float, float]]) -> None:
        excess = [s - h for s, h in tokens]
        width = min(WINDOW, len(excess))
        expected = max(math.fsum(excess[i : i + width]) / width for i in range(len(excess) - width + 1))
        assert peak([s for s, _ in tokens], [h for _, h in tokens], WINDOW) == pytest.approx(expected, abs=1e-9)


class TestEstimate:
    @pytest.mark.parametrize("text", [PROSE, GERMAN, RUSSIAN, CHINESE, CODE, BASE64, IDS])
    def test_ordinary_texts_of_any_language_carry_no_risk(self, estimator: Estimator, text: str) -> None:
        assert risk_of(estimator.surprise(text, 512), {}) == 0.0

    def test_random_characters_carry_some_wherever_they_stand(self, estimator: Estimator) -> None:
        for seed in range(20):
            alone = estimator.surprise(noise(seed), 512)
            after = estimator.surprise(PROSE + noise(seed), 512)
            assert risk_of(alone, {}) > 0
            assert risk_of(after, {}) > 0

    def test_eight_tokens_say_nothing(self, estimator: Estimator) -> None:
        assert estimator.surprise(noise(1, 32), 512) is None
        assert estimator.surprise(noise(1, 33), 512) is not None
        assert estimator.surprise("", 512) is None

    def test_only_the_ends_of_a_long_prompt_are_read(self, estimator: Estimator) -> None:
        middle = PROSE * 20 + noise(3) + PROSE * 20
        assert risk_of(estimator.surprise(middle, 64), {}) == 0.0
        assert risk_of(estimator.surprise(middle + noise(3), 64), {}) > 0
        assert risk_of(estimator.surprise(noise(3) + middle, 64), {}) > 0

    @given(st.text(max_size=400))
    def test_any_text_has_a_finite_surprise_or_none(self, text: str) -> None:
        found = Estimator.surprise(_SHARED, text, 32)
        assert found is None or math.isfinite(found.nats)

    @given(st.binary(min_size=1, max_size=300))
    def test_surprisals_and_entropies_are_such(self, data: bytes) -> None:
        surprisal, entropy = _SHARED._model.read(data)
        assert len(surprisal) == len(entropy) == len(data)
        assert (surprisal > -2.1).all()
        assert (entropy >= 0).all()
        assert (entropy <= math.log(256) + 0.05).all()

    def test_the_probabilities_of_all_bytes_after_a_context_add_up(self) -> None:
        """Within what steps of 0.05 nats can make of it."""
        model = ByteModel(load())
        for context in (b"the", b"and", b"ing", b"con", "не ".encode()[-3:], b"  r", b"zqx"):
            total = sum(math.exp(-model.read(context + bytes([byte]))[0][-1]) for byte in range(256))
            assert total == pytest.approx(1.0, abs=0.1)

    @given(st.one_of(st.binary(max_size=60), st.text("the aion", max_size=60).map(str.encode)))
    def test_it_is_the_back_off_of_its_tables(self, data: bytes) -> None:
        """Gram by gram, as ARPA files are read, whatever is kept ready."""
        surprisal, entropy = _SHARED._model.read(data)
        expected = [_backed_off(data, place) for place in range(len(data))]
        assert surprisal.tolist() == pytest.approx([nats for nats, _ in expected], abs=1e-5)
        assert entropy.tolist() == pytest.approx([nats for _, nats in expected], abs=1e-5)

    def test_its_version_is_of_its_contents(self) -> None:
        table = load()
        assert table.version.startswith("ngram-1-")
        other = np.array(table.unigram)
        other[0] += 1
        assert dataclasses.replace(table, unigram=other).version != table.version


_SHARED = Estimator()
_TABLE = load()


def _backed_off(data: bytes, place: int) -> tuple[float, float]:
    """Surprisal and entropy of one byte: those of the longest gram and context that are known, with the back-offs of
    the contexts on the way there."""
    unigram = np.exp(-NATS * _TABLE.unigram.astype(np.float64))
    unigram /= unigram.sum()
    surprisal, entropy = NATS * float(_TABLE.unigram[data[place]]), float(-(unigram * np.log(unigram)).sum())
    for length in range(2, min(ORDER, place + 1) + 1):
        gram = data[place - length + 1 : place + 1]
        slot, mark = _place(gram[:-1], len(_TABLE.contexts))
        if _TABLE.contexts[slot] != mark:
            continue
        entropy = ENTROPY_NATS * float(_TABLE.entropies[slot])
        surprisal += BACKOFF_FROM + NATS * float(_TABLE.backoffs[slot])
        slot, mark = _place(gram, len(_TABLE.grams))
        if _TABLE.grams[slot] == mark:
            surprisal = NATS * float(_TABLE.nats[slot])
    return surprisal, entropy


def _place(gram: bytes, slots: int) -> tuple[int, int]:
    [slot], [mark] = places(np.array([int.from_bytes(gram, "big")], np.uint64), len(gram), slots)
    return int(slot), int(mark)


class TestRamp:
    @pytest.mark.parametrize(("nats", "risk"), [(3.9, 0.0), (5.0, 0.25), (6.0, 0.5), (40.0, 0.5), (-3.0, 0.0)])
    def test_a_models_ramp_goes_from_four_nats_to_six_and_never_above_a_half(self, nats: float, risk: float) -> None:
        assert risk_of(Surprise(nats, "0a1b2c"), {}) == pytest.approx(risk)

    def test_each_revision_may_have_its_own(self) -> None:
        ramps = {"0a1b2c": RampConfig(calm=1.0, alarm=2.0), "ngram": RampConfig(calm=8.0, alarm=9.0)}
        assert risk_of(Surprise(2.0, "0a1b2c"), ramps) == 0.5
        assert risk_of(Surprise(7.0, load().version), ramps) == 0.0
        assert risk_of(Surprise(2.0, "another"), ramps) == 0.0

    def test_what_was_not_read_carries_none(self) -> None:
        assert risk_of(None, {}) == 0.0

    @given(st.text(max_size=3000), st.integers(1, 300))
    def test_the_ends_are_bounded_and_all_of_a_short_text(self, text: str, tokens: int) -> None:
        parts = ends_of(text, tokens)
        assert all(len(part) <= 8 * tokens for part in parts)
        assert text.encode().startswith(parts[0])
        assert text.encode().endswith(parts[-1])
        assert len(parts) == 2 or parts[0] == text.encode()


class Scores:
    """What the workers answer to Score."""

    def __init__(self, mesh: Mesh) -> None:
        self.nats = 5.5  # of each token, above its entropy
        self.tokens = 40
        self.hold: asyncio.Event | None = None
        self.failure: MeshError | None = None
        self.requests: list[worker_pb2.ScoreRequest] = []
        for worker in mesh.workers:
            worker.scores = self.answer

    async def answer(self, request: worker_pb2.ScoreRequest) -> worker_pb2.ScoreResponse:
        self.requests.append(request)
        if self.hold is not None:
            await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        scored = worker_pb2.ScoredText(logprobs=[-2.0 - self.nats] * self.tokens, entropies=[2.0] * self.tokens)
        return worker_pb2.ScoreResponse(scored=[scored], model_revision="r1")


@pytest.fixture
def scores(mesh: Mesh) -> Scores:
    return Scores(mesh)


async def told(mesh: Mesh, text: str) -> Any:
    """What the caller is told of its admission."""
    return (await collect(mesh.stream(text)))[0].start.admission


async def idle(mesh: Mesh) -> None:
    await until(lambda: not mesh.vigilance._scoring)


class TestModelsScore:
    @pytest.fixture
    def router_config(self) -> dict[str, Any]:
        return {"entropy": EntropyConfig(model="m", tokens=100, seconds=60.0, in_flight=2)}

    @pytest.fixture
    def holder(self) -> Any:
        return key(tokens_per_minute=100_000)

    async def test_it_is_about_the_callers_next_requests(self, mesh: Mesh, scores: Scores) -> None:
        first = await told(mesh, PROSE)
        assert (first.weight, first.surprise_source) == (1.0, load().version)
        await idle(mesh)
        other = await told(mesh, GERMAN)
        risk = 0.5 * (5.5 - 4.0) / 2.0
        assert other.risk == pytest.approx(risk, abs=0.02)
        assert other.weight == pytest.approx(1 + 7 * risk**2, abs=0.05)

    async def test_the_same_prompt_is_known_at_once_and_not_read_again(self, mesh: Mesh, scores: Scores) -> None:
        await told(mesh, PROSE)
        await idle(mesh)
        again = await told(mesh, PROSE)
        assert (again.surprise, again.surprise_source) == (5.5, "r1")
        await idle(mesh)
        assert len(scores.requests) == 1

    async def test_a_calm_model_does_not_outweigh_the_estimate(self, mesh: Mesh, scores: Scores) -> None:
        scores.nats = 0.0
        first = await told(mesh, noise(1))
        await idle(mesh)
        again = await told(mesh, noise(1))
        assert again.risk >= first.risk - 0.01 > 0, "random characters do not surprise a model that knows of them"
        assert len(scores.requests) == 1

    async def test_no_token_waits_for_it(self, mesh: Mesh, scores: Scores) -> None:
        scores.hold = asyncio.Event()
        answer = await collect(mesh.stream(PROSE))
        assert answer[-1].HasField("end"), "the whole answer came while the score was held back"
        await until(lambda: scores.requests)
        scores.hold.set()
        await idle(mesh)
        assert (await told(mesh, GERMAN)).risk > 0.3, "and it counts when it comes"

    async def test_it_is_asked_with_the_lowest_priority_and_the_tenants_own_prefixes(
        self, mesh: Mesh, scores: Scores
    ) -> None:
        await told(mesh, PROSE)
        await idle(mesh)
        (request,) = scores.requests
        assert request.priority == pb.PRIORITY_BATCH
        assert request.tenant == "t"
        assert len(request.cache_salt) == 16
        assert request.input.prompt == PROSE

    async def test_of_a_long_prompt_both_ends_are_read(self, mesh: Mesh, scores: Scores) -> None:
        await told(mesh, "a" * 400 + "b" * 400 + "ü" * 200)
        await idle(mesh)
        assert [request.input.prompt for request in scores.requests] == ["a" * 400, "ü" * 200]

    async def test_eight_tokens_are_no_score(self, mesh: Mesh, scores: Scores) -> None:
        scores.tokens, scores.nats = 7, 50.0
        await told(mesh, PROSE)
        await idle(mesh)
        assert (await told(mesh, GERMAN)).risk == 0.0

    @pytest.mark.parametrize("nats", [math.nan, math.inf])
    async def test_nonsense_is_no_score(self, mesh: Mesh, scores: Scores, nats: float) -> None:
        scores.nats = nats
        await told(mesh, PROSE)
        await idle(mesh)
        assert (await told(mesh, PROSE)).surprise_source == load().version

    async def test_a_worker_that_fails_leaves_the_estimate(self, mesh: Mesh, scores: Scores) -> None:
        scores.failure = MeshError(Reason.OVERLOADED, "no")
        assert (await collect(mesh.stream(PROSE)))[-1].HasField("end")
        await idle(mesh)
        again = await told(mesh, PROSE)
        assert (again.risk, again.surprise_source) == (0.0, load().version)

    async def test_a_router_has_no_more_prompts_scored_at_a_time_than_it_may(self, mesh: Mesh, scores: Scores) -> None:
        scores.hold = asyncio.Event()
        for number in range(5):
            await told(mesh, f"{PROSE} {number}")
        await until(lambda: len(scores.requests) == 2)
        scores.hold.set()
        await idle(mesh)
        assert len(scores.requests) == 2
        await told(mesh, f"{PROSE} and again")
        await idle(mesh)
        assert len(scores.requests) == 3, "there is room again"

    async def test_a_refused_request_is_not_scored(self, mesh: Mesh, scores: Scores) -> None:
        scores.nats = 0.0
        for _ in range(5):
            await failure(mesh.stream("attack"))
        await idle(mesh)
        asked = len(scores.requests)
        assert (await failure(mesh.stream(PROSE))).reason == Reason.BREAKER_OPEN
        await idle(mesh)
        assert len(scores.requests) == asked

    async def test_what_is_remembered_is_neither_the_prompt_nor_another_tenants(
        self, mesh: Mesh, scores: Scores, state: Redis
    ) -> None:
        await told(mesh, PROSE)
        await idle(mesh)
        (place,) = await state.keys("meshlm:{t}:surprise:*")
        assert await state.get(place) == b"r1 5.5000"
        assert 0 < await state.ttl(place) <= 3600


class TestEstimateInForce:
    @pytest.fixture
    def holder(self) -> Any:
        return key(tokens_per_minute=100_000)

    async def test_a_strange_prompt_weighs_more_at_once_and_is_never_refused(self, mesh: Mesh) -> None:
        for seed in range(8):
            admission = await told(mesh, noise(seed))
            assert 1.0 < admission.weight <= 2.75
        assert (await told(mesh, PROSE)).weight > 1.0, "and so do the caller's next ones"

    @pytest.mark.parametrize("router_config", [{"risk": RiskConfig(mode="shadow")}])
    async def test_in_shadow_mode_it_is_only_told(self, mesh: Mesh) -> None:
        admission = await told(mesh, noise(1))
        assert (admission.weight, admission.shadow) == (1.0, True)
        assert admission.shadow_weight > 1.0

    async def test_token_ids_have_no_surprise(self, mesh: Mesh) -> None:
        mesh.rekey((key(raw_prompts=True),))
        start = (await collect(mesh.stream(input=pb.Input(token_ids=pb.TokenIds(ids=range(50))))))[0].start
        assert not start.admission.HasField("surprise")
