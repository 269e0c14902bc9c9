"""What must be true of a mesh that was used cruelly, once all is quiet. Each check gives what is wrong, as text."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psutil
from soak_calls import TROUBLE, Call, allowed
from soak_mesh import FLIGHT_SECONDS, ROUTERS, TENANTS, WORKERS, SoakMesh, until

from meshlm.chassis.errors import Reason
from meshlm.chassis.spans import read_trace

AFTER = 12.0  # seconds for which a fault may be felt: starts, breakers and ejections included
# Lines of a log that nobody should find there.
UNFORESEEN = ('"library":', "unforeseen error", "the service failed", "Traceback")
# gRPC's own word on an answer whose asker was killed while it was sent.
NOBODY_THERE = "ExecuteBatchError raised in core by servicer method"
QUESTION_MS = 60_000  # that the store remembers a question, at most
QUIET_SECONDS = 60.0  # within which all must be quiet
SETTLING = 3.0  # seconds within which a call whose caller left is settled, on a busy machine
GROWTH = 48 << 20  # bytes by which a process may grow in a run


def endings(soak: SoakMesh, calls: list[Call]) -> Iterator[str]:
    """Each call ended as it asked for, by a limit, or by a fault that was there."""
    for call in calls:
        yield from (f"{call.id} ({call.kind}): {wrong}" for wrong in call.wrong)
        span = call.begun, call.ended
        met = soak.faulty(*span, *soak.names, "valkey", after=AFTER)
        reached = soak.faulty(*span, *ROUTERS, after=3.0)
        if call.ending in allowed(call) or (call.ending in (*TROUBLE, Reason.DEADLINE) and met):
            continue
        if call.ending == "transport" and reached and call.status in ("UNAVAILABLE", "INTERNAL", "CANCELLED"):
            continue
        if call.ending == "complete" and call.finishes and set(call.finishes.values()) <= {"content_filter"}:
            continue
        yield f"{call.id} ({call.kind}) ended with {call.ending} {call.status}, wanted {call.wanted}"


def records(soak: SoakMesh) -> dict[str, list[dict[str, Any]]]:
    """The audit log's records by the request's id."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name in ROUTERS:
        for line in soak.records(name):
            if line.get("event") == "request":
                found[line["request_id"]].append({**line, "router": name})
    return found


def audit(soak: SoakMesh, calls: list[Call], log: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """One record for each request that was taken, and in it what its caller was told."""
    unheard = {Reason.REQUEST_INVALID, Reason.KEY_INVALID, Reason.KEY_NOT_ALLOWED, Reason.DRAINING}
    for call in calls:
        found = log.get(call.id, [])
        if call.kind in ("library", "question"):  # asks again by itself, or makes no answer
            continue
        hasty = call.ending == Reason.DEADLINE and call.kind == "hasty" and call.start is None  # may not have arrived
        lost = hasty or call.ending in (*unheard, "transport")
        lost = lost or _unsettled(soak, call)
        if len(found) > 1 or not (found or lost):
            yield f"{call.id} ({call.kind}, {call.ending}) has {len(found)} records"
        if not found:
            continue
        billed, told = found[0]["billed_tokens"], call.usage.prompt_tokens + call.usage.completion_tokens
        exact = call.whole and call.ending in ("complete", Reason.BUDGET_SPENT)
        if found[0]["cache"] in ("hit", "shared"):
            if billed:
                yield f"{call.id}: an answer from the cache was billed"
        elif billed < told or (exact and billed != told):
            yield f"{call.id} ({call.kind}, {call.ending}): billed {billed}, told {told}"
        if exact and call.ending == "complete" and found[0]["outcome"] != "complete":
            yield f"{call.id}: complete for its caller, {found[0]['outcome']} in the record"


async def ledger(soak: SoakMesh, calls: list[Call], log: dict[str, list[dict[str, Any]]]) -> AsyncIterator[str]:
    """Each tenant was charged what its records say, and what reservations of killed routers hold; no more, no less."""
    lost = [call for call in calls if call.start is not None and (call.id not in log or call.kind == "library")]
    lost = [call for call in lost if not call.cached and _unsettled(soak, call)]
    for tenant in TENANTS:
        taken = (record for records in log.values() for record in records if record["tenant"] == tenant.name)
        bills = {f"{record['request_id']}/{record['trace_id']}": record for record in taken}
        held = await _held(soak, tenant.name)
        low = high = sum(amount for amount in held.values())
        for request, record in bills.items():
            cost = record["cost_micros"] or 0
            if request in held:  # its settlement was lost with its router
                if not _lost(soak, record):
                    yield f"{tenant.name}: {request} is recorded, and its reservation is open"
                continue
            high += cost
            low += 0 if record["ledger"] == "emergency" and _lost(soak, record) else cost
        for request in set(held) - set(bills):
            if not any(fault.kind == "kill" and fault.target in ROUTERS for fault in soak.faults):
                yield f"{tenant.name}: the reservation of {request} is open, and no router was killed"
        # A router may be killed between a settlement and its record.
        high += sum(_most(call) for call in lost if call.tenant == tenant)
        spent = int(await soak.redis.get(tenant.spent_key) or 0)
        if not low <= spent <= high:
            yield f"{tenant.name} was charged {spent}; its records and open reservations say {low} to {high}"


async def _held(soak: SoakMesh, tenant: str) -> dict[str, int]:
    """What open reservations hold of the tenant's money, by the ids of request and trace."""
    held: dict[str, int] = {}
    async for key in soak.redis.scan_iter(f"meshlm:{{{tenant}}}:reservation:*", count=1000):
        if b"/inquiry/" in key:
            continue
        value = await soak.redis.get(key)
        if value is not None and value != b"settled":
            request = key.decode().split(":reservation:")[1].rpartition("/")[0]
            held[request] = held.get(request, 0) + int(float(value.split()[-1]))
    return held


def _unsettled(soak: SoakMesh, call: Call) -> bool:
    """Whether a router was struck before it can have settled the call."""
    return soak.faulty(call.begun, call.ended + SETTLING, *ROUTERS, after=1.0)


def _most(call: Call) -> int:
    """Tokens that it can have been billed."""
    sampling = call.request.generation.sampling
    return call.usage.prompt_tokens + call.choices * int(sampling.max_tokens)


def _lost(soak: SoakMesh, record: dict[str, Any]) -> bool:
    """Whether its router ended after it: what that still owed a store that was away is gone."""
    written = datetime.fromisoformat(record["timestamp"]).timestamp()
    return any(
        f.kind in ("kill", "renew") and f.target == record["router"] and f.begun >= written - 1 for f in soak.faults
    )


async def quiet(soak: SoakMesh) -> AsyncIterator[str]:
    """Nothing is left of any call: no block, no sequence, no place, no flight."""
    for name in (*WORKERS, "tools"):

        async def idle(name: str = name) -> bool:
            load = await soak.load(name)
            return load.ready and load.running == load.waiting == 0 and load.free_blocks == load.total_blocks

        try:
            await until(idle, QUIET_SECONDS)
        except TimeoutError:
            load = await soak.load(name)
            told = f"running {load.running}, waiting {load.waiting}, free {load.free_blocks} of {load.total_blocks}"
            yield f"worker {name} is not idle: {told}"

    async def landed() -> bool:
        return not [key async for key in soak.redis.scan_iter("meshlm:*:flight:*")]

    async def left() -> bool:
        now = time.time() * 1e6
        keys = [key async for key in soak.redis.scan_iter("meshlm:*:concurrent_streams")]
        return not [key for key in keys if await soak.redis.zcount(key, now, "+inf")]

    async def asked() -> bool:
        keys = [key async for key in soak.redis.scan_iter("meshlm:*:reservation:*/inquiry/*", count=1000)]
        return not [key for key in keys if await soak.redis.pttl(key) > QUESTION_MS]

    for what, condition in (("flights", landed), ("places of streams", left), ("questions", asked)):
        try:
            await until(condition, QUIET_SECONDS + FLIGHT_SECONDS)
        except TimeoutError:
            yield f"{what} are left in the store"


@dataclass(frozen=True)
class Size:
    """Of a process."""

    pid: int
    bytes: int
    files: int


def sizes(soak: SoakMesh) -> dict[str, Size]:
    """Of all services."""
    found = {}
    for name in soak.names:
        process = psutil.Process(soak.mesh.pid(name))
        found[name] = Size(process.pid, process.memory_info().rss, process.num_fds())
    return found


def growth(before: dict[str, Size], after: dict[str, Size]) -> Iterator[str]:
    for name, size in after.items():
        if size.bytes > before[name].bytes + GROWTH:
            yield f"{name} grew from {before[name].bytes >> 20} to {size.bytes >> 20} MiB"
        if size.files > before[name].files + 24:
            yield f"{name} has {size.files} open files, {before[name].files} before"


def connections(soak: SoakMesh) -> list[str]:
    """Callers that routers still hold on to, though none is there."""
    port = int(soak.mesh.target.rpartition(":")[2])
    held = []
    for name in ROUTERS:
        found = psutil.Process(soak.mesh.pid(name)).net_connections("tcp")
        ours = [c for c in found if c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port]
        held += [f"{name} holds a connection from {connection.raddr}" for connection in ours]
    return held


def logs(soak: SoakMesh) -> Iterator[str]:
    """Nothing in any log that nobody foresaw. The first of each kind."""
    seen: Counter[str] = Counter()
    for name in soak.names:
        for line in soak.folder.log(name).read_text(errors="replace").splitlines():
            if NOBODY_THERE not in line and any(word in line for word in UNFORESEEN):
                told = line
                if line.startswith("{"):
                    record = json.loads(line)
                    told = f"{record.get('event')} {record.get('error', '')} {record.get('where', '')}"
                seen[f"{name}'s log: {told}"] += 1
    yield from (f"{line} ({count} times)" for line, count in seen.items())


def spans(soak: SoakMesh, calls: list[Call]) -> Iterator[str]:
    """The trace of each of these calls has one root, and nothing of it is missing from the caller to the settlement."""
    for call in calls:
        if call.start is None:
            continue
        trace = read_trace(str(soak.folder.spans), call.start.trace_id)
        ids = {span.span_id for span in trace}
        roots = [span.name for span in trace if span.parent_id not in ids]
        names = {span.name.rpartition("/")[2] for span in trace}
        wanted = {"router.admit", "router.settle"} | (set() if call.cached else {"RunGeneration"})
        if len(roots) != 1 or not wanted <= names:
            yield f"the trace of {call.id} has roots {roots}, and lacks {sorted(wanted - names)}"


__all__ = ["audit", "connections", "endings", "growth", "ledger", "logs", "quiet", "records", "sizes", "spans"]
