"""Traffic splits: shares, and who stays where."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from meshlm.router.routing.config import TargetConfig
from meshlm.router.routing.splits import arm_of, point

SUBJECTS = [f"key/t/{number}" for number in range(4000)]
weights = st.lists(st.floats(0.01, 100, allow_nan=False), min_size=2, max_size=6)


def arms(*values: float) -> list[TargetConfig]:
    return [TargetConfig(model=f"m{number}", weight=value) for number, value in enumerate(values)]


@settings(max_examples=25, deadline=None)
@given(weights, st.text(max_size=8))
def test_each_arm_gets_its_share_within_five_standard_deviations(values: list[float], route: str) -> None:
    got = Counter(arm_of(route, subject, arms(*values)).model for subject in SUBJECTS)
    for number, value in enumerate(values):
        share, count = value / sum(values), len(SUBJECTS)
        assert abs(got[f"m{number}"] - count * share) <= 5 * math.sqrt(count * share * (1 - share)) + 1


@settings(max_examples=50, deadline=None)
@given(weights, st.randoms(use_true_random=False), st.text(max_size=20))
def test_the_order_of_the_arms_decides_nothing(values: list[float], shuffler: object, subject: str) -> None:
    one = arms(*values)
    other = list(one)
    shuffler.shuffle(other)  # type: ignore[attr-defined]
    assert arm_of("r", subject, one) == arm_of("r", subject, other)


def test_a_canary_that_grows_keeps_everyone_it_had() -> None:
    before = {s for s in SUBJECTS if arm_of("r", s, arms(90, 10)).model == "m1"}
    after = {s for s in SUBJECTS if arm_of("r", s, arms(70, 30)).model == "m1"}
    assert before < after


def test_an_arm_that_is_turned_off_moves_only_its_own() -> None:
    before = {s: arm_of("r", s, arms(50, 30, 20)).model for s in SUBJECTS}
    after = {s: arm_of("r", s, arms(50, 0, 20)).model for s in SUBJECTS}
    assert "m1" not in after.values()
    assert all(after[s] == before[s] for s in SUBJECTS if before[s] != "m1")


def test_routes_split_independently_of_each_other() -> None:
    both = sum(arm_of("a", s, arms(1, 1)) == arm_of("b", s, arms(1, 1)) for s in SUBJECTS)
    assert abs(both - 2000) < 5 * math.sqrt(1000)


def test_parts_that_read_alike_when_joined_are_different_points() -> None:
    assert len({point("a", "bc"), point("ab", "c"), point("abc"), point("a", "b", "c"), point("a\0", "bc")}) == 5


def test_the_hash_is_what_it_was_so_that_a_new_release_moves_nobody() -> None:
    # blake2b, 8 bytes, of each part behind its length (8 bytes, big-endian); by hashlib alone.
    import hashlib

    data = b"".join(len(part).to_bytes(8, "big") + part for part in (b"r", b"m0", b"key/t/1"))
    expected = ((int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 11) + 0.5) / 2**53
    assert point("r", "m0", "key/t/1") == expected
