"""Configuration of the router (section `router`)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from meshlm.chassis.config import ServerConfig

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True)
class KeyConfig:
    """An API key: who calls, and what the caller may do."""

    # Name of the key, in traces, logs and bills.
    id: str
    # SHA-256 of the whole key, lower-case hex. `meshlm key new` makes both.
    secret_hash: str
    # Whose key it is: answers, prefixes and limits are never shared between tenants.
    tenant: str
    # Models this key may use; empty: all.
    models: tuple[str, ...] = ()
    # Requests a minute; 0: no limit. A minute's worth may come at once.
    requests_per_minute: int = 0
    # Tokens a minute, input and answer together; 0: no limit. A minute's worth may come at once.
    tokens_per_minute: int = 0
    # May send token ids, and plain prompts in which control tokens count.
    raw_prompts: bool = False
    # Name of the guard's policy; empty: the guard's default.
    guard_policy: str = ""
    # What happens when the guard cannot answer.
    guard_failure: Literal["refuse", "allow"] = "refuse"
    # Priority of requests that name none, and the most urgent that a request may name.
    priority: Literal["critical", "interactive", "standard", "batch"] = "interactive"

    def __post_init__(self) -> None:
        for name in ("id", "tenant"):
            if not _NAME.fullmatch(getattr(self, name)):
                raise ValueError(f"{name} must have 1 to 128 of A-Z a-z 0-9 . _ -")
        if len(self.secret_hash) != 64 or set(self.secret_hash) - set("0123456789abcdef"):
            raise ValueError("secret_hash must be a SHA-256 in lower-case hex")
        if min(self.requests_per_minute, self.tokens_per_minute) < 0:
            raise ValueError("a limit cannot be negative")


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
    # Callers. Without one, every call is refused.
    keys: tuple[KeyConfig, ...] = ()
    # Model of requests that name none; empty: the only model there is.
    default_model: str = ""
    # Other names of models.
    aliases: dict[str, str] = field(default_factory=dict)
    # Most tokens of an answer whose request sets no limit.
    default_max_tokens: int = 512
    # Largest input, bytes of UTF-8; no more than the guard takes (guard.max_input_chars).
    max_input_bytes: int = 500_000
    # Seconds a whole request may take where the caller sets no deadline.
    default_deadline_seconds: float = 600.0
    # Seconds the guard may take for an input, or for one piece of an answer.
    guard_seconds: float = 10.0
    # Seconds the cache may take to find an answer (waiting for another's flight is extra).
    cache_seconds: float = 1.0
    # Seconds to wait for another request's identical answer before making one's own.
    shared_flight_seconds: float = 60.0
    # Share of each limit that one router grants by itself while the ledger does not answer. Range (0, 1].
    emergency_share: float = 0.1
    # Seconds after which a reservation nobody settled is given up (its charge stays).
    reservation_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 < self.emergency_share <= 1:
            raise ValueError("emergency_share must be in (0, 1]")
        if self.default_max_tokens < 1:
            raise ValueError("default_max_tokens must be at least 1")
        for name, values in (("id", [k.id for k in self.keys]), ("secret_hash", [k.secret_hash for k in self.keys])):
            if len(set(values)) != len(values):
                raise ValueError(f"two keys have the same {name}")
