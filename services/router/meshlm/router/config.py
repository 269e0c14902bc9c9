"""Configuration of the router (section `router`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from meshlm.chassis.config import ServerConfig
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.router.replicas.proof_config import ProofConfig
from meshlm.router.risk.config import BreakerConfig, EntropyConfig, RiskConfig
from meshlm.router.routing.config import RouteConfig, check_callers, check_names
from meshlm.router.streams.config import StreamsConfig

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """How much may be used; 0: no limit. docs/limits.md says how each is counted."""

    # Requests a minute. A minute's worth may come at once.
    requests_per_minute: int = 0
    # Tokens a minute, input and answer together. A minute's worth may come at once.
    tokens_per_minute: int = 0
    # Input tokens a minute. A minute's worth may come at once.
    prompt_tokens_per_minute: int = 0
    # Answer tokens a minute. A minute's worth may come at once.
    completion_tokens_per_minute: int = 0
    # Requests in progress at a time.
    concurrent_streams: int = 0
    # Money from midnight to midnight UTC, millionths of the currency that `router.prices` are in.
    micros_per_day: int = 0
    # Money from the first to the last of a month, UTC; same unit.
    micros_per_month: int = 0

    def __post_init__(self) -> None:
        for limit in fields(LimitConfig):
            if getattr(self, limit.name) < 0:
                raise ValueError(f"{limit.name}: a limit cannot be negative")

    @property
    def limited(self) -> bool:
        """Whether there is any limit here."""
        return any(getattr(self, limit.name) for limit in fields(LimitConfig))

    @property
    def budgeted(self) -> bool:
        """Whether there is a limit on money here."""
        return bool(self.micros_per_day or self.micros_per_month)


@dataclass(frozen=True, kw_only=True)
class PriceConfig:
    """What a model's tokens cost: whole millionths of one currency, for a million tokens."""

    # A million input tokens.
    prompt: int
    # A million input tokens that were in the worker's prefix cache; unset: as `prompt`.
    cached_prompt: int | None = None
    # A million answer tokens.
    completion: int

    def __post_init__(self) -> None:
        if min(self.prompt, self.cached, self.completion) < 0:
            raise ValueError("a price cannot be negative")
        # Tokens times price are counted in the store's numbers, which are exact up to 2^53: some 9 million tokens.
        if max(self.prompt, self.cached, self.completion) > 1_000_000_000:
            raise ValueError("a price cannot be above 1,000,000,000 (a thousand for a million tokens)")

    @property
    def cached(self) -> int:
        """A million input tokens found in the prefix cache."""
        return self.prompt if self.cached_prompt is None else self.cached_prompt


@dataclass(frozen=True, kw_only=True)
class TenantConfig(LimitConfig):
    """What all keys of a tenant may use together."""

    # Limits on single models, beside those on all models together.
    model_limits: dict[str, LimitConfig] = field(default_factory=dict)
    # Regions in which its requests may be computed and kept; empty: all. `eu` allows `eu-west-1` too.
    regions: tuple[str, ...] = ()
    # Name of the guard's policy for its keys that name none; empty: the guard's default.
    guard_policy: str = ""


@dataclass(frozen=True)
class KeyConfig(LimitConfig):
    """An API key: who calls, and what the caller may do."""

    # Name of the key, in traces, logs and bills.
    id: str
    # SHA-256 of the whole key, lower-case hex. `meshlm key new` makes both.
    secret_hash: str
    # Whose key it is: answers, prefixes and limits are never shared between tenants.
    tenant: str
    # Models this key may use; empty: all.
    models: tuple[str, ...] = ()
    # Limits on single models, beside those on all models together.
    model_limits: dict[str, LimitConfig] = field(default_factory=dict)
    # Regions in which its requests may be computed and kept, among those of its tenant; empty: all of those.
    regions: tuple[str, ...] = ()
    # May send token ids, and plain prompts in which control tokens count.
    raw_prompts: bool = False
    # Name of the guard's policy; empty: its tenant's.
    guard_policy: str = ""
    # What happens when the guard cannot answer.
    guard_failure: Literal["refuse", "allow"] = "refuse"
    # What is done with this key's risk (docs/risk.md); empty: as `router.risk.mode` says.
    risk: Literal["", "enforce", "shadow", "off"] = ""
    # How a model gets to read text that is not its speaker's own (`parts` marked untrusted, messages of tools), so that
    # it takes no orders from it: `datamark`: spaces replaced by a character that no document can know; `delimit`: lines
    # around it, which costs fewer tokens and helps less; `off`: like all other text. See docs/guard.md.
    spotlight: Literal["off", "datamark", "delimit"] = "datamark"
    # Put a secret token into system messages, and stop answers that hold it in whatever disguise: they leak the prompt.
    canary: bool = False
    # Priority of requests that name none, and the most urgent that a request may name.
    priority: Literal["critical", "interactive", "standard", "batch"] = "interactive"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("id", "tenant"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} must have 1 to 128 of A-Z a-z 0-9 . _ -")
        if len(self.secret_hash) != 64 or set(self.secret_hash) - set("0123456789abcdef"):
            raise ValueError("secret_hash must be a SHA-256 in lower-case hex")


@dataclass(frozen=True)
class RouterConfig:
    """The router."""

    server: ServerConfig = field(
        default_factory=lambda: ServerConfig(listen="127.0.0.1:50051", admin_listen="127.0.0.1:50052")
    )
    # Targets of the workers.
    workers: tuple[str, ...] = ("127.0.0.1:50061",)
    # Target of the guard; empty: no guard, and every verdict is absent.
    guard: str = "127.0.0.1:50071"
    # Target of the cache; empty: no cache.
    cache: str = "127.0.0.1:50081"
    # Region in which this router, its log and its state lie.
    region: str = "local"
    # Region of the guard; empty: the router's.
    guard_region: str = ""
    # Region of the cache; empty: the router's.
    cache_region: str = ""
    # Callers. Without one, every call is refused.
    keys: tuple[KeyConfig, ...] = ()
    # Limits of tenants, over all their keys, by the tenant's name.
    tenants: dict[str, TenantConfig] = field(default_factory=dict)
    # Prices by the model's name; a model without one costs nothing.
    prices: dict[str, PriceConfig] = field(default_factory=dict)
    # What follows from callers' risk.
    risk: RiskConfig = field(default_factory=RiskConfig)
    # How surprising prompts are, and what reads them.
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    # When bursts of attacks open a breaker.
    breakers: BreakerConfig = field(default_factory=BreakerConfig)
    # Model, alias or route of requests that name none; empty: the only model there is.
    default_model: str = ""
    # Other names of models or routes.
    aliases: dict[str, str] = field(default_factory=dict)
    # Names that lead to a model by rules. docs/routing.md says how.
    routes: dict[str, RouteConfig] = field(default_factory=dict)
    # How a replica is chosen among those of a model.
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    # What happens when there is more work than the workers can do.
    overload: OverloadConfig = field(default_factory=OverloadConfig)
    # Most tokens of an answer whose request sets no limit.
    default_max_tokens: int = 512
    # Largest input, bytes of UTF-8; no more than the guard takes (guard.max_input_chars).
    max_input_bytes: int = 500_000
    # Seconds a whole request may take where the caller sets no deadline.
    default_deadline_seconds: float = 600.0
    # Seconds the guard may take for an input, or for one piece of an answer.
    guard_seconds: float = 10.0
    # Tokens of a stream that the guard may not have taken yet; with more, the worker waits for it.
    guard_hold_tokens: int = 128
    # Times in a row that the guard does not answer, after which it is not waited for; 0: it always is.
    guard_failures: int = 3
    # Seconds after which one request tries again whether the guard answers.
    guard_retry_seconds: float = 1.0
    # Seconds the cache may take to find an answer (waiting for another's flight is extra).
    cache_seconds: float = 1.0
    # After the cache did not answer: seconds in which requests go on without it, but for one that tries. 0: each asks.
    cache_retry_seconds: float = 1.0
    # Seconds to wait for another request's identical answer before making one's own.
    shared_flight_seconds: float = 60.0
    # Share of each limit that one router grants by itself while the ledger does not answer. Range (0, 1].
    emergency_share: float = 0.1
    # Seconds after which a reservation nobody settled is given up (its charge stays).
    reservation_seconds: float = 3600.0
    # Seconds without a sign of life after which a stream no longer counts as in progress: its router died. At least 1.
    lease_seconds: float = 30.0
    # How streams survive the loss of workers and connections.
    streams: StreamsConfig = field(default_factory=StreamsConfig)
    # Answers that are computed again elsewhere, to find workers that compute wrongly.
    proof: ProofConfig = field(default_factory=ProofConfig)

    def __post_init__(self) -> None:
        if not 0 < self.emergency_share <= 1:
            raise ValueError("emergency_share must be in (0, 1]")
        if self.lease_seconds < 1 or self.reservation_seconds < self.lease_seconds:
            raise ValueError("lease_seconds must be at least 1, and reservation_seconds at least that")
        if self.guard_hold_tokens < 1 or self.guard_failures < 0:
            raise ValueError("guard_hold_tokens must be at least 1, and guard_failures at least 0")
        if self.cache_retry_seconds < 0:
            raise ValueError("cache_retry_seconds cannot be negative")
        if self.default_max_tokens < 1:
            raise ValueError("default_max_tokens must be at least 1")
        for name, values in (("id", [k.id for k in self.keys]), ("secret_hash", [k.secret_hash for k in self.keys])):
            if len(set(values)) != len(values):
                raise ValueError(f"two keys have the same {name}")
        if unheld := set(self.tenants) - {key.tenant for key in self.keys}:
            raise ValueError(f"tenants.{min(unheld)}: no key is of this tenant")
        self._check_names()
        if not self.guard and any(key.canary for key in self.keys):
            raise ValueError("a key has `canary`, and there is no guard to look for it")
        if not self.prices and any(limits.budgeted for limits in self.all_limits()):
            raise ValueError("a limit on money needs `prices`: without them nothing costs anything")

    def _check_names(self) -> None:
        check_names(self.aliases, self.routes)
        check_callers(self.routes, {key.tenant for key in self.keys}, {key.id for key in self.keys})
        kinds = {**dict.fromkeys(self.routes, "a route"), **dict.fromkeys(self.aliases, "an alias")}
        for name in sorted({*self.prices, *self._limited_models()} & set(kinds)):
            raise ValueError(f"{name} is {kinds[name]}: limits and prices are by a model's own name")
        for number, key in enumerate(self.keys):
            for name in sorted(set(key.models) & set(kinds)):
                raise ValueError(
                    f"keys[{number}].models: {name} is {kinds[name]}: a key's models are by their own names"
                )

    @property
    def callers(self) -> tuple[KeyConfig, ...]:
        """The keys, with their tenant's policy where they name none."""
        policies = {name: tenant.guard_policy for name, tenant in self.tenants.items()}
        return tuple(replace(k, guard_policy=k.guard_policy or policies.get(k.tenant, "")) for k in self.keys)

    def all_limits(self) -> Iterator[LimitConfig]:
        """Every holder's limits, over all models and on single ones."""
        for holder in self._holders():
            yield holder
            yield from holder.model_limits.values()

    def _holders(self) -> list[KeyConfig | TenantConfig]:
        return [*self.keys, *self.tenants.values()]

    def _limited_models(self) -> set[str]:
        return {model for holder in self._holders() for model in holder.model_limits}
