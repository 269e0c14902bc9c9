"""Which limits a request has, and which configurations are refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from meshlm.chassis.config import Source
from meshlm.router.accounts.limits import CONFIGURED, Kind, LimitBook, Usage
from meshlm.router.config import LimitConfig, RouterConfig, TenantConfig
from tests.router.book import PRICE, Book, key


def test_names_that_callers_send_are_not_remembered() -> None:
    book = Book(None, key(tokens_per_minute=1000, model_limits={"large": LimitConfig(requests_per_minute=1)}))
    for number in range(100):
        assert len(book.terms(model=f"unheard-of-{number}").limits) == 1
    assert len(book.terms(model="large").limits) == 2
    assert len(book._book._known) == 2


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"prices": {}}, "prices"),
        ({"tenants": {"nobody": TenantConfig(requests_per_minute=1)}}, "nobody"),
        ({"aliases": {"fast": "m"}, "prices": {"fast": PRICE}}, "alias"),
        ({"lease_seconds": 0.5}, "lease_seconds"),
    ],
)
def test_limits_that_would_never_hold_are_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RouterConfig(keys=(key(micros_per_day=5),), **{"prices": {"m": PRICE}, **config})


@pytest.mark.parametrize("kind", CONFIGURED)
def test_a_limit_below_zero_is_refused_by_its_name(kind: Kind) -> None:
    with pytest.raises(ValueError, match=kind):
        key(**{kind: -1})
    with pytest.raises(ValueError, match=kind):
        TenantConfig(**{kind: -1})


def test_the_example_of_the_documentation_can_be_used() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "limits.md").read_text()
    example = page.split("```toml\n")[1].split("```")[0].replace('"..."', f'"{"0" * 64}"')
    config = Source({"router": tomllib.loads(example)["router"]}, {}).section("router", RouterConfig)
    terms = LimitBook(config).terms(config.keys[0], "large")
    assert {(limit.holder, limit.model, limit.kind): limit.amount for limit in terms.limits} == {
        ("key", "", Kind.REQUESTS): 600,
        ("key", "", Kind.TOKENS): 100_000,
        ("key", "", Kind.STREAMS): 16,
        ("key", "large", Kind.COMPLETION): 10_000,
        ("tenant", "", Kind.MONTH): 100_000_000,
        ("tenant", "large", Kind.DAY): 5_000_000,
    }
    assert terms.cost(Usage(prompt=1_000_000, cached=500_000, completion=1_000_000)) == 75_000 + 37_500 + 600_000
