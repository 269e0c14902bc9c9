"""What may be used, by whom, and what it costs: limits of keys, tenants and models as one flat list for the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from meshlm.router.config import KeyConfig, LimitConfig, PriceConfig, RouterConfig

# A price is per million tokens.
MILLION = 1_000_000
_MINUTE_US = 60_000_000


class Kind(StrEnum):
    """What a limit counts; the name is its field in the configuration, but for the last."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    PROMPT = "prompt_tokens_per_minute"
    COMPLETION = "completion_tokens_per_minute"
    STREAMS = "concurrent_streams"
    DAY = "micros_per_day"
    MONTH = "micros_per_month"
    # No field: as many as requests, of what makes no answer.
    INQUIRIES = "inquiries_per_minute"

    @property
    def money(self) -> bool:
        return self in (Kind.DAY, Kind.MONTH)

    @property
    def form(self) -> str:
        """How the ledger counts it: `rate` (GCRA over a minute), `streams` (leases), `day` or `month` (UTC)."""
        return {Kind.STREAMS: "streams", Kind.DAY: "day", Kind.MONTH: "month"}.get(self, "rate")


# Those that are fields of the configuration.
CONFIGURED = tuple(kind for kind in Kind if kind is not Kind.INQUIRIES)


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; `cached` are those of the prompt that were in the worker's prefix cache."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True)
class Limit:
    """One number that must not be passed."""

    kind: Kind
    amount: int
    holder: str  # `key` or `tenant`
    holder_id: str
    model: str  # empty: all models together
    state: str  # where the ledger counts it

    @cached_property
    def places(self) -> tuple[str, ...]:
        """The ledger's keys of it."""
        return (self.state, f"{self.state}:weights") if self.kind is Kind.STREAMS else (self.state,)

    @cached_property
    def rule(self) -> str:
        """What the ledger must know of it: its form, its amount, and for a rate the microseconds of a unit."""
        emission = _MINUTE_US / self.amount if self.kind.form == "rate" else 0
        return f"{self.kind.form} {self.amount} {emission!r}"

    @property
    def metadata(self) -> dict[str, str]:
        """Which limit, and whose, for an error's metadata."""
        told = {"limit": str(self.kind), "holder": self.holder, "holder_id": self.holder_id}
        return {**told, "model": self.model} if self.model else told


@dataclass(frozen=True)
class Line:
    """What a request costs under one limit: `fixed + each * completion tokens`, in the limit's unit.

    For money both are in millionths of a micro-unit (price times tokens), and their sum is rounded up.
    """

    fixed: float
    each: float
    scale: int = 1

    def cost(self, completion: int) -> float:
        total = self.fixed + self.each * completion
        return total if self.scale == 1 else -(-int(total) // self.scale)


@dataclass(frozen=True)
class Terms:
    """Under what a request runs."""

    tenant: str
    limits: tuple[Limit, ...]
    price: PriceConfig | None = None
    # Tokens and concurrent streams are counted so many times; money and requests are not. At least 1.
    weight: float = 1.0

    def cost(self, usage: Usage) -> int | None:
        """Micro-units, rounded up to a whole one; None without a price."""
        if self.price is None:
            return None
        fresh = usage.prompt - usage.cached
        total = fresh * self.price.prompt + usage.cached * self.price.cached + usage.completion * self.price.completion
        return -(-total // MILLION)

    def line(self, limit: Limit, usage: Usage, weight: float) -> Line:
        """What this limit is charged for a prompt, and for each token that follows."""
        match limit.kind:
            case Kind.REQUESTS | Kind.INQUIRIES:
                return Line(1, 0)
            case Kind.TOKENS:
                return Line(weight * usage.prompt, weight)
            case Kind.PROMPT:
                return Line(weight * usage.prompt, 0)
            case Kind.COMPLETION:
                return Line(0, weight)
            case Kind.STREAMS:
                return Line(weight, 0)
        price = self.price
        if price is None:
            return Line(0, 0, MILLION)
        fixed = (usage.prompt - usage.cached) * price.prompt + usage.cached * price.cached
        return Line(fixed, price.completion, MILLION)


class LimitBook:
    """The configuration's limits and prices, looked up by key and model."""

    def __init__(self, config: RouterConfig) -> None:
        self._tenants = config.tenants
        self._prices = config.prices
        self._known: dict[tuple[str, str, str], tuple[KeyConfig, tuple[Limit, ...]]] = {}

    def terms(self, key: KeyConfig, model: str, weight: float = 1.0) -> Terms:
        """The terms of one request of this key for this model (its real name, no alias). `weight`: at least 1."""
        tenant = self._tenants.get(key.tenant)
        named = model in key.model_limits or (tenant is not None and model in tenant.model_limits)
        # A caller may send any name while a worker cannot be heard: only the configuration's are remembered.
        place = (key.tenant, key.id, model if named else "")
        known = self._known.get(place)
        if known is None or known[0] is not key:
            known = self._known[place] = (key, tuple(self._limits(key, model)))
        return Terms(key.tenant, known[1], self._prices.get(model), max(1.0, weight))

    def inquiry_terms(self, key: KeyConfig) -> Terms:
        """The terms of one question of this key that makes no answer."""
        limits = list(_of(key, "key", key.id, "", key.tenant, inquiries=True))
        if (tenant := self._tenants.get(key.tenant)) is not None:
            limits += _of(tenant, "tenant", key.tenant, "", key.tenant, inquiries=True)
        return Terms(key.tenant, tuple(limits))

    def _limits(self, key: KeyConfig, model: str) -> Iterator[Limit]:
        yield from _of(key, "key", key.id, "", key.tenant)
        if model in key.model_limits:
            yield from _of(key.model_limits[model], "key", key.id, model, key.tenant)
        tenant = self._tenants.get(key.tenant)
        if tenant is not None:
            yield from _of(tenant, "tenant", key.tenant, "", key.tenant)
            if model in tenant.model_limits:
                yield from _of(tenant.model_limits[model], "tenant", key.tenant, model, key.tenant)


def _of(
    config: LimitConfig, holder: str, holder_id: str, model: str, tenant: str, *, inquiries: bool = False
) -> Iterator[Limit]:
    # One hash slot a tenant: one script looks at the limits of a key and of its tenant together.
    place = f"meshlm:{{{tenant}}}:{holder}" + (f":{holder_id}" if holder == "key" else "")
    for kind in (Kind.INQUIRIES,) if inquiries else CONFIGURED:
        if amount := getattr(config, Kind.REQUESTS if inquiries else kind):
            state = f"{place}:{kind}" + (f":{model}" if model else "")
            yield Limit(kind, amount, holder, holder_id, model, state)
