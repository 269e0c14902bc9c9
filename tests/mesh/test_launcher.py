"""The launcher: with stand-ins for what goes wrong, with the real services and the fake engine for the whole."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from meshlm.chassis.config import ConfigError, Source
from meshlm.chassis.errors import MeshError, Reason
from meshlm.mesh.client import AsyncMesh
from meshlm.mesh.config import MeshConfig
from meshlm.mesh.launcher import AddressTaken, GaveUp, LocalMesh, NotReady, isolated_mesh
from meshlm.mesh.plan import MeshPlan, Planner, ProcessPlan
from meshlm.mesh.process import Died, ProcessEvent, Ready, Stopped
from meshlm.mesh.state import MeshNotRunningError, StateFolder, StateFolderError
from meshlm.mesh.status import load_of
from meshlm.mesh.up import Stage, last_stage
from meshlm.v1 import worker_pb2
from tests.mesh.fakes import PATIENT, failing, plan, service
from tests.waiting import until

QUICK = MeshConfig(ready_seconds=120.0, stop_seconds=60.0)


@pytest.fixture
def root() -> Iterator[Path]:
    """A short path: pytest's own is too long for some unix sockets."""
    with TemporaryDirectory(prefix="meshlm-") as folder:
        yield Path(folder)


@pytest.fixture
def folder(root: Path) -> Iterator[StateFolder]:
    made = StateFolder(root / "state")
    made.acquire()
    yield made
    made.release()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestPlan:
    def planned(self, root: Path, text: str = "", **environ: str) -> MeshPlan:
        file = root / "mesh.toml"
        file.write_text(text)
        source = Source.read(file, environ)
        config = source.section("mesh", MeshConfig)
        return Planner(source, config, StateFolder(root), config_path=file, environ=environ).plan("mlm_key")

    def test_services_meet_at_each_others_addresses(self, root: Path) -> None:
        made = {process.name: process for process in self.planned(root).processes}
        router = made["router"].environment
        assert router["MESHLM__ROUTER__WORKERS"] == f'["{made["worker"].address}"]'
        assert router["MESHLM__ROUTER__GUARD"] == made["guard"].environment["MESHLM__GUARD__SERVER__LISTEN"]
        assert router["MESHLM__ROUTER__CACHE"] == made["cache"].environment["MESHLM__CACHE__SERVER__LISTEN"]
        assert made["cache"].environment["MESHLM__STATE__REDIS_URL"] == made["valkey"].address

    def test_an_address_in_the_configuration_is_kept(self, root: Path) -> None:
        made = self.planned(
            root, '[router.server]\nlisten = "127.0.0.1:7001"\n', MESHLM__GUARD__SERVER__LISTEN="127.0.0.1:7002"
        )
        guard = next(process for process in made.processes if process.name == "guard")
        assert (made.router, guard.address) == ("127.0.0.1:7001", "127.0.0.1:7002")

    def test_a_redis_url_means_no_private_valkey(self, root: Path) -> None:
        made = self.planned(root, '[state]\nredis_url = "redis://elsewhere"\n')
        assert "valkey" not in {process.name for process in made.processes}
        assert all("MESHLM__STATE__REDIS_URL" not in process.environment for process in made.processes)

    def test_no_local_key_beside_configured_ones(self, root: Path) -> None:
        keys = f'[[router.keys]]\nid = "a"\ntenant = "a"\nsecret_hash = "{"0" * 64}"\n'
        assert self.planned(root, keys).key == ""
        assert self.planned(root).key == "mlm_key"

    def test_each_worker_has_its_own_name_address_and_overrides(self, root: Path) -> None:
        made = self.planned(
            root,
            '[worker]\nengine = "fake"\n[[mesh.workers]]\nname = "one"\n'
            '[[mesh.workers]]\nname = "two"\noverrides = { "fake.block_size" = "32" }\n',
        )
        one, two = (process for process in made.processes if process.part == "worker")
        assert one.address != two.address
        assert two.environment["MESHLM__WORKER__NAME"] == "two"
        assert two.environment["MESHLM__WORKER__FAKE__BLOCK_SIZE"] == "32"
        assert "MESHLM__WORKER__FAKE__BLOCK_SIZE" not in one.environment
        assert not made.needs_model

    def test_a_guard_switched_off_is_not_started(self, root: Path) -> None:
        made = self.planned(root, '[router]\nguard = ""\n')
        assert "guard" not in {process.name for process in made.processes}

    def test_admin_ports_do_not_collide(self, root: Path) -> None:
        made = self.planned(root, "[mesh]\nadmin_from = 9100\n")
        ports = [process.admin for process in made.processes if process.part != "valkey"]
        assert sorted(ports) == [f"127.0.0.1:{9100 + i}" for i in range(4)]

    def test_two_workers_of_one_name_are_refused(self, root: Path) -> None:
        with pytest.raises(ConfigError, match=r"mesh: two workers have the same name"):
            self.planned(root, '[[mesh.workers]]\nname = "a"\n[[mesh.workers]]\nname = "a"\n')

    def test_a_folder_too_deep_for_sockets_is_refused_with_the_way_out(self, root: Path) -> None:
        deep = root / ("d" * 100)
        with pytest.raises(StateFolderError, match="--state-dir"):
            Planner(Source.read(None, {}), MeshConfig(), StateFolder(deep), environ={}).plan("")


class TestStateFolder:
    def test_a_second_mesh_on_the_same_folder_is_told_who_holds_it(self, folder: StateFolder) -> None:
        with pytest.raises(StateFolderError, match=rf"already runs .*pid {os.getpid()}\)"):
            StateFolder(folder.root).acquire()

    def test_a_released_folder_can_be_had_again(self, root: Path) -> None:
        first, second = StateFolder(root), StateFolder(root)
        first.acquire()
        first.release()
        second.acquire()
        second.release()

    def test_the_key_is_for_its_owner_alone_and_stays_the_same(self, folder: StateFolder) -> None:
        key = folder.key()
        assert key == folder.key()
        assert len(key) > 40
        assert stat.S_IMODE(folder.key_file.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700

    def test_what_a_dead_launcher_left_is_no_running_mesh(self, root: Path) -> None:
        (root / "mesh.json").write_text("{}")
        (root / "lock").write_text("1\n")
        with pytest.raises(MeshNotRunningError, match="no mesh runs"):
            StateFolder(root).running()


@pytest.mark.mesh
class TestProcesses:
    async def test_they_end_in_the_order_of_their_calls(self, root: Path, folder: StateFolder) -> None:
        parts = ("cache", "guard", "worker", "router")
        async with LocalMesh(plan(*(service(part, part, root) for part in parts)), folder, QUICK) as mesh:
            pids = [mesh.pid(part) for part in parts]
            assert {s.name for s in folder.running().services} == set(parts)
        journal = (root / "journal").read_text().split("\n")[:-1]
        assert journal == [
            f"{part} {what}" for part in ("router", "worker", "guard", "cache") for what in ("drains", "ends")
        ]
        assert not any(alive(pid) for pid in pids)

    async def test_a_killed_service_is_started_again_and_told_of(self, root: Path, folder: StateFolder) -> None:
        events: list[ProcessEvent] = []
        async with LocalMesh(plan(service("guard", "guard", root)), folder, QUICK, tell=events.append) as mesh:
            first = mesh.pid("guard")
            os.kill(first, signal.SIGKILL)
            await until(lambda: sum(isinstance(event, Ready) for event in events) == 2)
            assert mesh.pid("guard") != first
            assert folder.running().services[0].pid == mesh.pid("guard")
        (died,) = [event for event in events if isinstance(event, Died)]
        assert (died.name, died.why) == ("guard", "killed by SIGKILL")

    async def test_a_service_that_cannot_live_ends_the_mesh_with_its_last_words(self, folder: StateFolder) -> None:
        deaths: list[ProcessEvent] = []
        with pytest.raises(GaveUp, match=r"(?s)guard died 5 times in a minute, at last: exit code 3.*no luck today"):
            await LocalMesh(plan(failing("guard", 3)), folder, QUICK, tell=deaths.append).start()
        assert sum(isinstance(event, Died) for event in deaths) == 4

    async def test_a_configuration_error_is_not_tried_again(self, folder: StateFolder) -> None:
        events: list[ProcessEvent] = []
        with pytest.raises(GaveUp, match=r"(?s)cannot use its configuration.*no luck today"):
            await LocalMesh(plan(failing("guard", 2)), folder, QUICK, tell=events.append).start()
        assert not any(isinstance(event, Died) for event in events)

    async def test_a_service_that_never_serves_is_named_and_nothing_is_left(
        self, root: Path, folder: StateFolder
    ) -> None:
        sleeper = ProcessPlan(
            "worker", "worker", (sys.executable, "-S", "-c", "import time; time.sleep(60)"), {}, f"unix:{root}/no"
        )
        mesh = LocalMesh(plan(sleeper), folder, MeshConfig(ready_seconds=1.0, stop_seconds=5.0))
        with pytest.raises(NotReady, match="worker"):
            await mesh.start()
        assert not alive(mesh.pid("worker"))

    async def test_a_service_deaf_to_sigterm_is_killed(self, root: Path, folder: StateFolder) -> None:
        real = service("guard", "guard", root)
        deaf = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        command = (*real.command[:2], deaf + real.command[2], *real.command[3:])
        stubborn = ProcessPlan("guard", "guard", command, {}, real.address)
        config = MeshConfig(ready_seconds=120.0, stop_seconds=0.3)
        async with LocalMesh(plan(stubborn), folder, config) as mesh:
            pid = mesh.pid("guard")
        assert not alive(pid)

    async def test_nothing_outlives_a_launcher_that_is_killed(self, root: Path) -> None:
        script = (
            "import asyncio, sys\nfrom pathlib import Path\n"
            "from meshlm.mesh.launcher import LocalMesh\nfrom meshlm.mesh.state import StateFolder\n"
            "from tests.mesh.fakes import plan, service\nfrom tests.mesh.test_launcher import QUICK\n"
            "async def main():\n"
            "    folder = StateFolder(Path(sys.argv[1]) / 'state'); folder.acquire()\n"
            "    async with LocalMesh(plan(service('guard', 'guard', Path(sys.argv[1]))), folder, QUICK) as mesh:\n"
            "        print(mesh.pid('guard'), flush=True); await mesh.wait()\n"
            "asyncio.run(main())\n"
        )
        launcher = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, str(root), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert launcher.stdout is not None
        child = int(await launcher.stdout.readline())
        assert alive(child)
        launcher.kill()
        await launcher.wait()
        await until(lambda: not alive(child))


FAKE = {
    **PATIENT,
    "MESHLM__WORKER__ENGINE": "fake",
    "MESHLM__WORKER__MODEL": "letters",
    "MESHLM__MESH__READY_SECONDS": "120.0",
    "MESHLM__MESH__STOP_SECONDS": "60.0",
}


async def letters(mesh: LocalMesh, prompt: str = "hello") -> str:
    async with AsyncMesh(mesh.target, key=mesh.key) as client:
        return (await client.generate(messages=[("user", prompt)], temperature=0.0, max_tokens=32)).text


@pytest.mark.mesh
class TestRealServices:
    async def test_the_mesh_answers_drains_and_leaves_nothing(self, root: Path) -> None:
        events: list[ProcessEvent] = []
        with isolated_mesh(root / "state", FAKE, tell=events.append) as mesh:
            async with mesh:
                answer = await letters(mesh)
                pids = [service.pid for service in mesh.running().services]
        assert answer
        assert not any(alive(pid) for pid in pids)
        ends = [event for event in events if isinstance(event, Stopped)]
        assert [event.name for event in ends] == ["router", "worker", "guard", "cache", "valkey"]
        assert all(event.clean for event in ends)

    async def test_it_answers_again_after_each_service_was_killed(self, root: Path) -> None:
        events: list[ProcessEvent] = []
        with isolated_mesh(root / "state", FAKE, tell=events.append) as mesh:
            async with mesh:
                for i, service in enumerate(mesh.running().services):
                    os.kill(service.pid, signal.SIGKILL)
                    await until(lambda done=i: sum(isinstance(event, Died) for event in events) == done + 1)
                    async with asyncio.timeout(120):
                        await mesh.wait_ready(service.name)
                        await answers(mesh, f"after {service.name}")
                assert [event.name for event in events if isinstance(event, Died)] == [
                    service.name for service in mesh.running().services
                ]

    async def test_two_meshes_run_side_by_side(self, root: Path) -> None:
        with isolated_mesh(root / "a", FAKE) as a, isolated_mesh(root / "b", FAKE) as b:
            async with a, b:
                assert await letters(a) == await letters(b)
                assert a.key != b.key
                async with AsyncMesh(a.target, key=b.key) as client:
                    with pytest.raises(MeshError) as caught:
                        await client.list_models()
        assert caught.value.reason is Reason.KEY_INVALID

    async def test_several_workers_of_one_machine_are_all_in_use(self, root: Path) -> None:
        workers = {"MESHLM__MESH__WORKERS": '[{name = "one"}, {name = "two", overrides = {"fake.block_size" = "32"}}]'}
        with isolated_mesh(root, {**FAKE, **workers}) as mesh:
            async with mesh, AsyncMesh(mesh.target, key=mesh.key) as client:
                (model,) = await client.list_models()
                assert model.ready_replicas == 2
                loads = [await told_load(mesh.address(name)) for name in ("one", "two")]
        assert [(load.replica, load.block_size) for load in loads] == [("one", 16), ("two", 32)]

    def test_an_address_in_use_is_told_before_anything_starts(self, root: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            overrides = {**FAKE, "MESHLM__ROUTER__SERVER__LISTEN": address}
            with (
                isolated_mesh(root, overrides) as mesh,
                pytest.raises(AddressTaken, match=rf"router cannot have {address} .*router\.server\.listen"),
            ):
                asyncio.run(mesh.start())


async def told_load(worker: str) -> worker_pb2.WatchLoadResponse:
    """What a worker says of itself, however busy it is."""
    async with asyncio.timeout(120):
        while (load := await load_of(worker)) is None:
            pass
    return load


async def answers(mesh: LocalMesh, prompt: str) -> None:
    """Until the mesh answers again: the router may need a moment to hear of a service that came back."""
    while True:
        try:
            assert await letters(mesh, prompt)
            return
        except MeshError as error:
            assert error.status is grpc.StatusCode.UNAVAILABLE, error
            await asyncio.sleep(0.1)


class TestStages:
    @pytest.mark.parametrize(
        ("line", "stage"),
        [
            ('{"event": "engine loading", "stage": "warm_up", "done": 2, "total": 3}', Stage("warm up", 2, 3)),
            ('{"event": "bound", "port": 1}', Stage("bound")),
            ("E1124 add_port.cc:83] Failed to add port", Stage("starting")),
            ("[1, 2]", Stage("starting")),
            ("", Stage("starting")),
        ],
    )
    def test_a_log_says_what_a_starting_service_does(self, line: str, stage: Stage, tmp_path: Path) -> None:
        log = tmp_path / "worker.log"
        log.write_text(f'{{"event": "earlier"}}\n{line}\n' if line else "")
        assert last_stage(log) == stage


@pytest.mark.mesh
class TestUp:
    """The command itself, as a person runs it."""

    async def start(self, root: Path, **environ: str) -> asyncio.subprocess.Process:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MESHLM_")}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "meshlm.mesh.cli", "up", "--state-dir", str(root)),
            env={**inherited, **FAKE, "MESHLM__ROUTER__SERVER__LISTEN": f"unix:{root}/router.sock", **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    async def ready(self, up: asyncio.subprocess.Process) -> str:
        """What it printed until it was ready."""
        assert up.stdout is not None
        async with asyncio.timeout(120):
            return (await up.stdout.readuntil(b"ready")).decode()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    async def test_a_signal_drains_and_exits_0(self, root: Path, number: signal.Signals) -> None:
        up = await self.start(root)
        shown = await self.ready(up)
        assert all(name in shown for name in ("valkey", "guard", "cache", "worker", "router"))
        services = StateFolder(root).running().services
        up.send_signal(number)
        out, err = await asyncio.wait_for(up.communicate(), 120)
        assert (up.returncode, err) == (0, b"")
        assert out.decode().count("ended") == 5
        assert not any(alive(service.pid) for service in services)
        with pytest.raises(MeshNotRunningError):
            StateFolder(root).running()

    async def test_a_signal_while_it_starts_also_exits_0(self, root: Path) -> None:
        up = await self.start(root)
        await until(lambda: (root / "logs" / "router.log").exists(), 120)
        up.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(up.communicate(), 120)
        assert (up.returncode, err) == (0, b"")

    async def test_a_second_mesh_on_the_folder_is_refused_with_a_reason(self, root: Path) -> None:
        holder = StateFolder(root)
        holder.acquire()
        second = await self.start(root)
        _, err = await asyncio.wait_for(second.communicate(), 120)
        holder.release()
        assert second.returncode == 1
        assert f"already runs on {root} (pid {os.getpid()})" in err.decode()

    async def test_a_second_signal_kills_what_does_not_drain(self, root: Path) -> None:
        up = await self.start(root)
        await self.ready(up)
        running = StateFolder(root).running()
        router = next(service for service in running.services if service.part == "router")
        os.kill(router.pid, signal.SIGSTOP)  # it will never drain
        up.send_signal(signal.SIGINT)
        assert up.stdout is not None
        await asyncio.wait_for(up.stdout.readuntil(b"draining"), 120)
        up.send_signal(signal.SIGINT)
        await asyncio.wait_for(up.communicate(), 120)
        assert up.returncode == 1
        assert not any(alive(service.pid) for service in running.services)
