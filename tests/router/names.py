"""Three models that are ready, and routes between them: what tests of names share. Nobody listens anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from meshlm.chassis.errors import MeshError
from meshlm.router.config import KeyConfig, RouterConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.routing.config import RouteConfig, RuleConfig, TargetConfig
from meshlm.router.routing.routes import Query, Routes
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2

MODELS = ("large", "new", "small")


def holder(name: str = "k", tenant: str = "t", **more: Any) -> KeyConfig:
    return KeyConfig(id=name, secret_hash=hashlib.sha256(name.encode()).hexdigest(), tenant=tenant, **more)


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    """A replica of each model, all ready; nobody listens."""
    made = Fleet([f"unix:/nowhere/{model}" for model in MODELS])
    for model in MODELS:
        up(made, model)
    yield made
    await made.stop()


def up(fleet: Fleet, model: str, *, ready: bool = True) -> None:
    served = worker_pb2.WorkerModel(name=model, revision=f"{model}-1", max_context=100, chat=True)
    replica = fleet.replicas[MODELS.index(model)]
    replica.hear(worker_pb2.WatchLoadResponse(replica=model, ready=ready, model=served))


def query(model: str = "r", key: KeyConfig | None = None, *, context: int = 10, **fields: Any) -> Query:
    chat = pb.Chat(messages=[pb.Message(role="user", content="hi")])
    generation = pb.Generation(**{"model": model, "input": pb.Input(chat=chat), **fields})
    return Query(generation, key or holder(), context, "request")


def routes(fleet: Fleet, *rules: RuleConfig, **more: Any) -> Routes:
    names = {name: more.pop(name) for name in ("aliases", "default_model") if name in more}
    keys = more.pop("keys", (holder(),))
    return Routes(RouterConfig(routes={"r": RouteConfig(rules=rules, **more)}, keys=keys, **names), fleet)


def to(*models: str, **more: Any) -> RuleConfig:
    return RuleConfig(targets=tuple(TargetConfig(model=model) for model in models), **more)


def refused(book: Routes, asked: Query) -> MeshError:
    with pytest.raises(MeshError) as caught:
        book.resolve(asked)
    return caught.value
