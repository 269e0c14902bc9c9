"""Who asks which worker of a mesh on one machine: the router for its callers, the guard for its verdicts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from meshlm.mesh.config import WorkerEntry

Users = tuple[str, ...]


def users(entries: Sequence[WorkerEntry], served: Sequence[str], models: Collection[str]) -> list[Users]:
    """Of each worker. `served`: the model of each; `models`: those that the guard asks.

    A worker whose entry does not say is the guard's alone if the guard asks for its model, unless that would leave the
    router none.
    """
    guards = [model in models for model in served]
    taken: list[Users] = [
        entry.used_by or (("guard",) if named else ("router",)) for entry, named in zip(entries, guards, strict=True)
    ]
    if any("router" in by for by in taken):
        return taken
    return [by if entry.used_by else ("router", *by) for entry, by in zip(entries, taken, strict=True)]


def model_name(name: str | None, path: str | None) -> str:
    """What a worker calls its model, as `worker.model` and `worker.model_path` say."""
    if name or path is None:
        return name or "fake"
    return Path(path).stem if path.endswith(".gguf") else Path(path).name
