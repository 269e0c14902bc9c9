"""What the choice among replicas is worth: a fleet of workers in simulated time.

The choice is the router's own code, with its digests, its loads as late as workers push them, and its own memory of
what it sent; so are the workers' prefix caches (`BlockPool`, `TextPrefixes`). Simulated are the workers' steps (prompts
in chunks, decodes in a batch), and time. Every policy sees the same arrivals. `least loaded` has the same pushed loads
and what its router sent since; `best` is ours without the draw among near-equals.

`shared`: prompts with long beginnings that callers share, at a rate that no policy's workers are short of, and at one
that only a good use of their caches can bear. `herd`: short prompts without anything shared, many of them between two
pushes, from one router and from eight.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from harness import Row, against, options, report

from meshlm.chassis.prefixes import TextPrefix
from meshlm.router.replicas.choosing import Wanted
from meshlm.router.replicas.config import ReplicaConfig
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.replica import Attempt, Replica
from meshlm.v1 import generation_pb2, worker_pb2
from meshlm.worker.engine.blocks import BlockPool, extend_chain
from meshlm.worker.front.text_prefixes import TextPrefixes, text_blocks

WORKERS = 8
BLOCK = 16
BLOCKS = 2400  # of a worker: its 16 to 20 sequences, and the beginnings of some ten callers
RUNNING = 24
CHUNK = 512
STEP = 0.008  # seconds of a step, and what each decode and each prompt token adds
DECODE = 0.0004
PREFILL = 0.0001
CALLERS = 64  # each with a beginning of its own, some asked far more often than others (Zipf, 0.9)
PUSH = 0.05  # seconds between two pushes of a worker, and from there to a router
ON_ITS_WAY = 0.002
SALT = b"s"
PEERS = ("random", "round robin", "least loaded")


@dataclass(frozen=True)
class Load:
    """What is asked."""

    name: str
    rate: float  # requests a second over all workers
    beginning: int  # bytes that all prompts of a caller begin with
    question: int  # bytes
    answer: int  # tokens


SHARED = Load("shared, 30/s", 30, 6000, 320, 80)
SHARED_BUSY = Load("shared, 60/s", 60, 6000, 320, 80)
HERD = Load("herd, 450/s", 450, 0, 160, 16)


@dataclass
class Request:
    text: str
    tokens: list[int]
    answer: int  # tokens
    arrival: float
    chain: list[bytes] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    computed: int = 0
    made: int = 0
    first: float = 0.0
    attempt: Attempt | None = None
    prefix: TextPrefix | None = None


class Worker:
    """One engine: a queue, a batch, and a prefix cache."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pool = BlockPool(BLOCKS)
        self.texts = TextPrefixes()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.busy = False
        self.step_seconds = STEP

    def submit(self, request: Request) -> None:
        prefix = request.prefix
        assert prefix is not None
        self.texts.note(text_blocks(prefix, request.tokens, BLOCK, SALT))
        self.waiting.append(request)

    def state(self) -> worker_pb2.WatchLoadResponse:
        pending = sum(len(r.tokens) - r.computed for r in (*self.running, *self.waiting))
        return worker_pb2.WatchLoadResponse(
            replica=self.name,
            ready=True,
            model=worker_pb2.WorkerModel(name="m", revision="r"),
            running=len(self.running),
            waiting=len(self.waiting),
            free_blocks=self.pool.free,
            total_blocks=BLOCKS,
            block_size=BLOCK,
            pending_prefill_tokens=pending,
            text_digest=self.texts.digest(self.pool.digest),
            step_seconds=self.step_seconds,
        )

    def step(self) -> tuple[float, list[Request], list[Request]]:
        """Seconds that it takes, who gets a first token in it, and who ends with it."""
        while self.waiting and len(self.running) < RUNNING and self._start(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        decodes = [r for r in self.running if r.made]
        left, firsts = CHUNK, []
        for request in self.running:
            if request.made or not left:
                continue
            count = min(left, len(request.tokens) - request.computed)
            left -= count
            request.computed += count
            self._publish(request)
            if request.computed == len(request.tokens):
                firsts.append(request)
        for request in (*decodes, *firsts):
            request.made += 1
        ended = [r for r in self.running if r.made >= r.answer]
        for request in ended:
            self.running.remove(request)
            self.pool.release(request.blocks)
        self.step_seconds = STEP + DECODE * len(decodes)
        return self.step_seconds + PREFILL * (CHUNK - left), firsts, ended

    def _start(self, request: Request) -> bool:
        extend_chain(request.chain, request.tokens, len(request.tokens) // BLOCK, BLOCK, SALT)
        whole = -(-(len(request.tokens) + request.answer) // BLOCK)
        got = self.pool.acquire(request.chain, whole)
        if got is None:
            return False
        request.blocks, known = got
        request.cached = request.computed = min(known * BLOCK, len(request.tokens) - 1)
        return True

    def _publish(self, request: Request) -> None:
        for number in range(request.cached // BLOCK, request.computed // BLOCK):
            parent = request.blocks[number - 1] if number else None
            self.pool.publish(request.blocks[number], request.chain[number], parent)


class Router:
    """One of the routers: what it knows is what was pushed to it, and what it sent."""

    def __init__(self, policy: str, clock: Callable[[], float], seed: int) -> None:
        targets = [f"unix:/nowhere/{number}" for number in range(WORKERS)]
        self.fleet = Fleet(targets, ReplicaConfig(slow_start_seconds=0.0, eject_slowness=0.0), clock=clock)
        self._chance = random.Random(seed)
        self.fleet.seed(seed)
        self._policy = policy
        self._turn = itertools.cycle(self.fleet.replicas)
        for _ in range(seed % WORKERS):
            next(self._turn)

    def place(self, request: Request) -> int:
        """The number of the worker that gets it."""
        request.prefix = TextPrefix(generation_pb2.Input(prompt=request.text), SALT)
        wanted = Wanted(model="m", tokens=len(request.text) // 3, prefix=request.prefix)
        replica, cached = self._choose(wanted)
        request.attempt = replica.begin(request.prefix, max(0, wanted.tokens - cached))
        return self.fleet.replicas.index(replica)

    def _choose(self, wanted: Wanted) -> tuple[Replica, int]:
        replicas = self.fleet.replicas
        if self._policy == "random":
            return self._chance.choice(replicas), 0
        if self._policy == "round robin":
            return next(self._turn), 0
        if self._policy == "least loaded":
            return min(replicas, key=lambda replica: (replica.load, self._chance.random())), 0
        choice = self.fleet.choose(wanted)
        if self._policy == "best":
            best = min(choice.candidates, key=lambda candidate: candidate.seconds)
            return best.replica, best.cached
        return choice.replicas[0], choice.cached(choice.replicas[0])


@dataclass(frozen=True)
class Outcome:
    cached: float  # share of all prompt tokens
    first: list[float]  # seconds to each first token
    uneven: float  # the busiest worker's prompt tokens over the mean of all

    def quantile(self, share: float) -> float:
        return sorted(self.first)[int(share * (len(self.first) - 1))]


class Simulation:
    """Events in the order of their time."""

    def __init__(self, policy: str, routers: int, arrivals: list[Request], seed: int) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._workers = [Worker(str(number)) for number in range(WORKERS)]
        self._routers = [Router(policy, lambda: self.now, seed + number) for number in range(routers)]
        self._arrivals = arrivals
        self._chance = random.Random(seed)
        self._open = len(arrivals)
        self._computed = [0] * WORKERS

    def run(self) -> Outcome:
        for number, worker in enumerate(self._workers):
            self._tell(number, worker.state())
            self._at(PUSH * number / WORKERS, lambda number=number: self._push(number))
        for request in self._arrivals:
            self._at(request.arrival, lambda request=request: self._arrive(request))
        while self._open:
            self.now, _, act = heapq.heappop(self._events)
            act()
        total = sum(len(request.tokens) for request in self._arrivals)
        cached = sum(request.cached for request in self._arrivals) / total
        mean = sum(self._computed) / WORKERS
        return Outcome(cached, [r.first - r.arrival for r in self._arrivals], max(self._computed) / mean)

    def _at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), act))

    def _push(self, number: int) -> None:
        state = self._workers[number].state()
        self._at(self.now + ON_ITS_WAY, lambda: self._tell(number, state))
        self._at(self.now + PUSH, lambda: self._push(number))

    def _tell(self, number: int, state: worker_pb2.WatchLoadResponse) -> None:
        for router in self._routers:
            router.fleet.replicas[number].hear(state)

    def _arrive(self, request: Request) -> None:
        number = self._chance.choice(self._routers).place(request)
        self._at(self.now + ON_ITS_WAY, lambda: self._submit(number, request))

    def _submit(self, number: int, request: Request) -> None:
        self._workers[number].submit(request)
        if not self._workers[number].busy:
            self._step(number)

    def _step(self, number: int) -> None:
        worker = self._workers[number]
        worker.busy = bool(worker.waiting or worker.running)
        if not worker.busy:
            return
        seconds, firsts, ended = worker.step()
        self._at(self.now + seconds, lambda: self._finish(number, firsts, ended))

    def _finish(self, number: int, firsts: list[Request], ended: list[Request]) -> None:
        for request in firsts:
            request.first = self.now
            fresh = len(request.tokens) - request.cached
            self._computed[number] += fresh
            assert request.attempt is not None
            request.attempt.note(_message(request, 1))
        for request in ended:
            assert request.attempt is not None
            end = _message(request, request.answer)
            end.end.timing.prefill = request.first - request.arrival
            request.attempt.note(end)
            request.attempt.end()
            self._open -= 1
        self._step(number)


def _message(request: Request, made: int) -> worker_pb2.RunGenerationResponse:
    usage = generation_pb2.Usage(
        prompt_tokens=len(request.tokens), cached_prompt_tokens=request.cached, completion_tokens=made
    )
    return worker_pb2.RunGenerationResponse(chunk=generation_pb2.Chunk(token_count=1), usage=usage)


def arrivals(load: Load, seed: int, count: int) -> list[Request]:
    """Poisson arrivals. Every caller's prompts have its beginning and a question of their own; 4 bytes are a token."""
    chance = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    beginnings = ["".join(chance.choices(letters, k=load.beginning)) for _ in range(CALLERS)]
    weights = [1 / (rank + 1) ** 0.9 for rank in range(CALLERS)]
    made, now = [], 0.0
    for caller in chance.choices(range(CALLERS), weights, k=count):
        now += chance.expovariate(load.rate)
        text = beginnings[caller] + "".join(chance.choices(letters, k=load.question))
        data = text.encode()
        tokens = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        made.append(Request(text, tokens, load.answer, now))
    return made


def runs(policy: str, load: Load, routers: int, *, quick: bool) -> list[Outcome]:
    count = 1200 if quick else 2000
    seeds = range(1 if quick else 3)
    return [Simulation(policy, routers, arrivals(load, seed, count), seed).run() for seed in seeds]


def compare(load: Load, routers: int, peers: tuple[str, ...], *, quick: bool) -> list[Row]:
    """Ours beside each other policy, in the same run and with the same arrivals."""
    figures: dict[tuple[str, str], Callable[[Outcome], float]] = {
        ("TTFT p50", "ms"): lambda outcome: 1000 * outcome.quantile(0.5),
        ("TTFT p99", "ms"): lambda outcome: 1000 * outcome.quantile(0.99),
        ("busiest worker", "x mean"): lambda outcome: outcome.uneven,
    }
    if load.beginning:
        figures = {("cached", "%"): lambda outcome: 100 * outcome.cached, **figures}
    ours, rows = runs("ours", load, routers, quick=quick), []
    for peer in peers:
        theirs = runs(peer, load, routers, quick=quick)
        for (figure, unit), of in figures.items():
            name = f"{figure}, {load.name}, {routers} router{'s' * (routers > 1)}"
            mine, others = [of(outcome) for outcome in ours], [of(outcome) for outcome in theirs]
            rows.append(against(name, unit, mine, peer, others, less_is_better=figure != "cached"))
    return rows


def main() -> None:
    chosen = options(__doc__ or "")
    rows: list[Row] = []
    for load in (SHARED, SHARED_BUSY):
        rows += compare(load, 1, PEERS, quick=chosen.quick)
    rows += compare(SHARED_BUSY, 8, PEERS, quick=chosen.quick)
    for routers in (1, 8):
        rows += compare(HERD, routers, (*PEERS, "best"), quick=chosen.quick)
    report("replica_choice", rows, chosen.json, workers=WORKERS)


if __name__ == "__main__":
    main()
