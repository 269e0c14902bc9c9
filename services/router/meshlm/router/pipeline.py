"""The way of a request. `Pipeline.run` reads as the list in DESIGN section 2; each stage is a module of its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import structlog
from opentelemetry import trace

from meshlm.chassis.errors import MeshError, Reason
from meshlm.chassis.telemetry import Name, span
from meshlm.router.accounts.budget import Budget
from meshlm.router.accounts.inquiries import Inquiries
from meshlm.router.accounts.ledger import Ledger
from meshlm.router.admission import Admission
from meshlm.router.answers import Answers
from meshlm.router.config import RouterConfig
from meshlm.router.decision import annotate, limits_of, routing_of
from meshlm.router.explain import Explainer
from meshlm.router.guarding.guards import Guards
from meshlm.router.guarding.window import OutputWindow
from meshlm.router.record import Recorder
from meshlm.router.replicas.fleet import Fleet
from meshlm.router.replicas.overload import Overload
from meshlm.router.replicas.proof import Prover
from meshlm.router.replicas.residency import Residency
from meshlm.router.risk.vigilance import Vigilance, admission_of
from meshlm.router.routing.routes import Routes
from meshlm.router.routing.shadow import Shadows
from meshlm.router.settling import Settling
from meshlm.router.streams.cascade import Call, Cascade
from meshlm.router.streams.dispatch import Dispatcher, token_text
from meshlm.router.streams.hedging import Hedges
from meshlm.router.streams.retries import RetryBudget
from meshlm.router.streams.returning import Returns
from meshlm.router.streams.survival import LastingCall
from meshlm.router.work import Work
from meshlm.v1 import cache_pb2, inference_pb2
from meshlm.v1 import generation_pb2 as pb

log = structlog.get_logger()

Response = inference_pb2.StreamGenerateResponse
T = TypeVar("T")


class Pipeline:
    def __init__(
        self,
        config: RouterConfig,
        *,
        ledger: Ledger,
        fleet: Fleet,
        answers: Answers,
        guards: Guards,
        vigilance: Vigilance,
        returns: Returns,
        prover: Prover,
    ) -> None:
        self._config = config
        self._ledger = ledger
        self.inquiries = Inquiries(config, ledger)
        self._fleet = fleet
        self.residency = Residency(config)
        self.routes = Routes(config, fleet)
        self._answers = answers
        self._settling = Settling()
        self._admission = Admission(config, ledger, answers, self.residency, self.routes, self._settling)
        self._guards = guards
        self._vigilance = vigilance
        self._returns = returns
        self._prover = prover
        self._hedges = Hedges(config.streams.hedge_percentile)
        self._recorder = Recorder()
        self._shadows = Shadows(config, fleet)
        retries = RetryBudget(config.streams.retry_share, config.streams.retries_per_second)
        overload = Overload(config.overload)
        fleet.listen(overload.note_end, overload.wake)
        self._dispatcher = Dispatcher(fleet, retries, overload)
        self._cascade = Cascade(self.routes, self._begin, self._admission.move)
        self.explainer = Explainer(
            config,
            ledger=ledger,
            fleet=fleet,
            routes=self.routes,
            residency=self.residency,
            vigilance=vigilance,
            overload=overload,
        )

    async def run(self, work: Work) -> AsyncGenerator[Response, None]:
        """The responses to a request that was identified. Passes through `_settle` whatever happens."""
        try:
            await self._returns.find(work)
            self._admission.resolve(work)
            await self._vigilance.look(work)
            await self._admission.admit(work)
            self._vigilance.read(work)
            if self._guards.present or self._answers.asks(work.generation):
                await self._choose(work)  # else nobody is asked before the worker, which is chosen then
            screening = self._begin_screening(work)
            try:
                if self._guards.comes_first(work.key):
                    await screening  # its policy may change the input: nobody sees it before
                await self._look_up(work, screening)
                stream = self._replay(work) if work.lookup.answer is not None else self._generate(work, screening)
                async with contextlib.aclosing(stream):
                    async for response in stream:
                        yield response
            finally:
                await _abandon(screening)
            work.outcome = "complete"
        except MeshError as error:
            work.error = error
            work.outcome, work.limit = error.reason, error.metadata.get("limit", "")
            raise
        except Exception:
            work.outcome = Reason.INTERNAL
            raise
        finally:
            if work.outcome == "cancelled" and work.late:
                work.outcome = Reason.DEADLINE  # gRPC cancels what is too late
            await self._settling.finish(self._settle(work))

    async def stop(self) -> None:
        """Wait for settlements still under way."""
        await self._settling.wait()
        await self._shadows.stop()
        await self._vigilance.stop()
        await self._ledger.stop()

    async def _choose(self, work: Work) -> None:
        while True:
            try:
                work.choice = self._fleet.choose(work.wanted)
                break
            except MeshError as error:
                if not await self._admission.fall_back(work, error):
                    raise
        annotate(trace.get_current_span(), work.choice)

    def _begin_screening(self, work: Work) -> asyncio.Future[pb.Verdict | None]:
        if self._guards.present:
            return asyncio.create_task(self._screen(work))
        nothing: asyncio.Future[pb.Verdict | None] = asyncio.get_running_loop().create_future()
        nothing.set_result(None)
        return nothing

    async def _screen(self, work: Work) -> pb.Verdict | None:
        begun = time.perf_counter()
        text = await token_text(work)
        screened = await self._guards.check_input(
            work.request_id, work.key, work.generation.input, text, seconds_left=work.seconds_left()
        )
        work.timing.guard = time.perf_counter() - begun
        if screened.redacted is not None:
            work.redact(screened.redacted)
        return screened.verdict

    async def _look_up(self, work: Work, screening: asyncio.Future[pb.Verdict | None]) -> None:
        """Leaves an answer in `work.lookup` only if its input passes the guard now, under the policy it was made."""
        if work.resumed:
            return  # chunk boundaries differ between runs: only the worker can cut an answer at a token
        if not self.residency.cache_allowed(work.regions):
            work.lookup.outcome = "region"
            return
        if work.choice is None:
            return  # nobody is asked
        begun = time.perf_counter()
        arguments = (work.request_id, work.key, work.generation, work.choice.revision, work.wording().name)
        work.lookup = await self._answers.look_up(*arguments, seconds_left=work.seconds_left())
        work.timing.cache = time.perf_counter() - begun
        if work.lookup.answer is None:
            return
        work.input_verdict = await screening
        if _policy(work.input_verdict) != _policy(work.lookup.answer.input_verdict):
            work.lookup = await self._answers.look_up(*arguments, seconds_left=work.seconds_left(), refresh=True)

    async def _replay(self, work: Work) -> AsyncGenerator[Response, None]:
        answer = work.lookup.answer
        assert answer is not None  # noqa: S101
        work.usage = answer.usage
        work.output_verdicts = list(answer.output_verdicts)
        yield Response(start=self._start(work), usage=work.usage)
        for chunk in answer.chunks:
            work.note(chunk)
            yield Response(chunk=chunk, usage=work.usage)
        end = self._end(work)
        if (cost := work.cost_micros) is not None:
            end.cost_micros = cost
        yield Response(end=end, usage=work.usage)

    async def _generate(
        self, work: Work, screening: asyncio.Future[pb.Verdict | None]
    ) -> AsyncGenerator[Response, None]:
        # Prefill and guard run at the same time; nothing leaves before the verdict.
        self._prover.sample(work)
        dispatching = asyncio.create_task(self._dispatch(work, screening)) if self._guards.present else None
        window = self._guards.open_output(work.request_id, work.key, work.generation.input, work.wording().canaries)
        call: Call | None = None
        try:
            work.input_verdict = await screening
            await window.open()
            call = await (dispatching or self._dispatch(work, screening))
            if call is None:
                async for response in self._replay(work):
                    yield response
                return
            budget = await self._open_budget(work)
            spent = False
            yield self._tell(work, start=self._start(work))
            async with contextlib.aclosing(window.through(call.messages())) as events:
                async for event in events:
                    if isinstance(event, pb.Chunk):
                        spent = not (budget.covers(after := work.after(event)) or await budget.secure(after))
                        if spent:
                            break
                        work.note(event)
                        yield self._tell(work, chunk=event)
                    elif isinstance(event, inference_pb2.Moderation):
                        yield self._tell(work, moderation=event)
                    else:
                        work.note_worker(event)
                    if work.complete and window.blocked:
                        break  # the worker does not know that nobody wants the rest
            if spent:
                async for response in self._cut(work, window):
                    yield response
                raise budget.error(work.billed)
            work.output_verdicts, work.judged = window.verdicts(), window.judged
            yield self._tell(work, end=self._end(work))
            await window.finish()
        finally:
            window.close()
            if call is None and dispatching is not None:
                call = await _abandon(dispatching)
            if call is not None:
                await call.close()

    async def _dispatch(self, work: Work, screening: asyncio.Future[pb.Verdict | None]) -> Call | None:
        """None where the model that it came to has answered this before: that is in `work.lookup`."""

        async def begin_anew() -> Call | None:
            await self._choose(work)
            await self._look_up(work, screening)
            return await self._cascade.call(work, begin_anew) if work.lookup.answer is None else None

        begin: Callable[[], Awaitable[Call | None]] = partial(self._cascade.call, work, begin_anew)
        while True:
            try:
                return await begin()
            except MeshError as error:
                if not await self._admission.fall_back(work, error):
                    raise
                begin = begin_anew

    async def _begin(self, work: Work) -> LastingCall:
        call = await self._dispatcher.first(work)
        if work.choice is not None:
            annotate(trace.get_current_span(), work.choice)
        return LastingCall(work, call, self._dispatcher, self._config.streams, self._hedges)

    async def _open_budget(self, work: Work) -> Budget:
        assert work.reservation is not None  # noqa: S101
        budget = Budget(self._ledger, work.reservation, work.completion_at_most)
        await budget.accept(work.charged(0))
        return budget

    async def _cut(self, work: Work, window: OutputWindow) -> AsyncGenerator[Response, None]:
        """The last messages of a stream that went as far as its limits let it."""
        async for event in window.rest():
            if isinstance(event, pb.Chunk):
                event.token_offset = work.end_of(event.choice)  # the window's last message was not sent
                work.note(event)
                yield self._tell(work, chunk=event)
            elif isinstance(event, inference_pb2.Moderation):
                yield self._tell(work, moderation=event)
        work.output_verdicts = window.verdicts()
        for choice in range(work.choices):
            if choice not in work.finishes:
                cut = pb.FINISH_REASON_BUDGET_SPENT
                chunk = pb.Chunk(choice=choice, token_offset=work.end_of(choice), finish_reason=cut)
                work.note(chunk)
                yield self._tell(work, chunk=chunk)
        yield self._tell(work, end=self._end(work))

    def _tell(self, work: Work, **event: Any) -> Response:
        """A message, with the usage that is billed if it is the last."""
        used = work.charged(work.sent)
        work.told = pb.Usage(
            prompt_tokens=used.prompt, cached_prompt_tokens=used.cached, completion_tokens=used.completion
        )
        if "end" in event and (cost := work.cost_micros) is not None:
            event["end"].cost_micros = cost
        return Response(usage=work.told, **event)

    def _start(self, work: Work) -> inference_pb2.StreamStart:
        start = inference_pb2.StreamStart(
            request_id=work.request_id,
            trace_id=work.trace_id,
            routing=routing_of(work),
            input_verdict=work.input_verdict,
        )
        if work.lookup.answer is None and (seed := work.seed) is not None:
            start.seed = seed
        if (admission := admission_of(work)) is not None:
            start.admission.MergeFrom(admission)
        if work.reservation is not None and (left := work.reservation.left):
            start.limits.MergeFrom(limits_of(left))
        return start

    def _end(self, work: Work) -> inference_pb2.StreamEnd:
        work.timing.total = work.elapsed()
        return inference_pb2.StreamEnd(timing=work.timing, output_verdicts=work.output_verdicts, replicas=work.replicas)

    async def _settle(self, work: Work) -> None:
        """What went out is billed, the rest given back; the answer goes to the cache, the record to the log."""
        billed = work.billed
        with span("router.settle", {Name.TOKENS_SETTLED: billed.prompt + billed.completion}) as current:
            if work.reservation is not None:
                if not await self._ledger.settle(work.reservation, billed):
                    log.warning("reservation not settled", mode=work.reservation.mode)
                current.set_attribute(Name.LEDGER_MODE, work.reservation.mode)
            if work.lookup.flight:
                await self._end_flight(work)
            await self._returns.keep(work)
        await self._vigilance.note(work)
        self._recorder.record(work)
        self._prover.prove(work)
        self._shadows.consider(work)

    async def _end_flight(self, work: Work) -> None:
        if not work.cacheable:
            await self._answers.release(work.lookup)
            return
        answer = cache_pb2.CachedAnswer(
            chunks=work.chunks,
            usage=work.usage,
            output_verdicts=work.output_verdicts,
            input_verdict=work.input_verdict,
        )
        await self._answers.keep(work.lookup, answer)


def _policy(verdict: pb.Verdict | None) -> str:
    return verdict.policy_version if verdict is not None else ""


async def _abandon(task: asyncio.Future[T]) -> T | None:
    """End a task whose result may no longer be wanted; its result, if it had one by then."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        return await task
    return None
