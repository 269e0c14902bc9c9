"""A ledger, and the terms of keys, for the tests of limits."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest
from redis.asyncio import Redis

from meshlm.chassis.errors import MeshError
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.accounts.limits import LimitBook, Terms
from meshlm.router.accounts.reservation import Reservation
from meshlm.router.config import KeyConfig, PriceConfig, RouterConfig

# 1 micro-unit a token.
PRICE = PriceConfig(prompt=1_000_000, completion=1_000_000)
DAY = 86_400


def key(name: str = "k", tenant: str = "t", **more: Any) -> KeyConfig:
    return KeyConfig(
        id=name, secret_hash=hashlib.sha256(f"{name}/{tenant}".encode()).hexdigest(), tenant=tenant, **more
    )


class Book:
    """A ledger, and the terms of keys; `m` is a model whose tokens cost one micro-unit each."""

    def __init__(self, state: Redis | None, *keys: KeyConfig, **config: Any) -> None:
        self.config = RouterConfig(keys=keys, **{"prices": {"m": PRICE}, "lease_seconds": 30.0, **config})
        self.ledger = Ledger(state, self.config)
        self._book = LimitBook(self.config)
        self._numbers = iter(range(10**9))
        self._began = time.monotonic()

    def terms(self, holder: KeyConfig | None = None, model: str = "m", weight: float = 1.0) -> Terms:
        return self._book.terms(holder or self.config.keys[0], model, weight)

    def back(self, per_minute: float = 1000) -> float:
        """The most that a rate can have given back since the book was opened."""
        return 1 + per_minute / 60 * (time.monotonic() - self._began)

    async def reserve(self, prompt: int, at_most: int = 1, name: str = "", **more: Any) -> Reservation:
        name = name or f"r{next(self._numbers)}"
        return await self.ledger.reserve(name, self.terms(**more), prompt, at_most)

    async def refused(self, prompt: int, at_most: int = 1, **more: Any) -> MeshError:
        with pytest.raises(MeshError) as caught:
            await self.reserve(prompt, at_most, **more)
        return caught.value


async def tokens_charged(state: Redis, per_minute: int = 300) -> float:
    """Tokens that the key's limit of so many a minute holds against it now."""
    value = await state.get("meshlm:{t}:key:k:tokens_per_minute")
    seconds, micros = await state.time()
    return max(0.0, int(value or 0) - seconds * 1_000_000 - micros) * per_minute / 60_000_000
