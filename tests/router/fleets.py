"""Fleets without a network: what workers push is given by hand, and so is the time."""

from __future__ import annotations

from typing import Any

from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.overload_config import OverloadConfig
from meshlm.v1 import worker_pb2


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def fleet(clock: Clock, *states: dict[str, Any], overload: OverloadConfig | None = None, **config: Any) -> Fleet:
    """Replicas `0`, `1`, ... that said so of themselves; they are no news unless slow_start_seconds is given."""
    made = Fleet(
        [f"unix:/nowhere/{number}" for number in range(len(states))],
        ReplicaConfig(**{"slow_start_seconds": 0.0, **config}),
        overload or OverloadConfig(),
        clock=clock,
    )
    made.seed(3)
    for number, (replica, fields) in enumerate(zip(made.replicas, states, strict=True)):
        replica.hear(state(number, **fields))
    return made


def state(number: int, **fields: Any) -> worker_pb2.WatchLoadResponse:
    model = worker_pb2.WorkerModel(name="m", revision=fields.pop("revision", "r1"))
    usual = {"ready": True, "free_blocks": 1000, "total_blocks": 1000, "block_size": 16, "step_seconds": 0.02}
    return worker_pb2.WatchLoadResponse(replica=str(number), model=model, **{**usual, **fields})
