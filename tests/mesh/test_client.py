"""The Python client against an in-process router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.mesh.client import AsyncMesh, End, Event, Mesh, Start, Text
from meshlm.mesh.requests import Asked, generation, with_documents
from meshlm.v1 import generation_pb2
from tests.mesh.fakes import KEY, WORDS, ScriptedRouter


def client(router: ScriptedRouter, key: str = KEY) -> AsyncMesh:
    return AsyncMesh(router.target, key=key)


async def collect(mesh: AsyncMesh, **asked: object) -> list[Event]:
    return [event async for event in mesh.stream(prompt="hello", **asked)]  # type: ignore[arg-type]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


class TestStream:
    async def test_events_carry_what_the_stream_told(self, router: ScriptedRouter) -> None:
        async with client(router) as mesh:
            start, *texts, end = await collect(mesh, request_id="mine")
        assert isinstance(start, Start)
        assert (start.routing.replica, start.limits, start.offset) == ("one", None, 0)
        assert [(text.text, text.token_offset) for text in texts if isinstance(text, Text)] == [
            (word, i) for i, word in enumerate(WORDS)
        ]
        assert isinstance(end, End)
        assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (7, 5)
        assert (end.finish_reasons, end.matched_stops) == ({0: "stop"}, {0: "<end>"})
        assert (end.cost_micros, end.timing.time_to_first_token) == (0, 0.5)
        assert end.output_verdicts[0].policy_version == "rules-1"
        assert router.metadata[0]["x-request-id"] == "mine"

    async def test_a_wrong_key_is_the_meshs_own_error(self, router: ScriptedRouter) -> None:
        async with client(router, "mlm_wrong") as mesh:
            with pytest.raises(MeshError, match="no such key") as caught:
                await collect(mesh)
        assert caught.value.reason is Reason.KEY_INVALID

    async def test_a_refusal_keeps_its_categories_and_its_wait(self, router: ScriptedRouter) -> None:
        router.refusal = MeshError(Reason.RATE_LIMITED, "later", metadata={"limit": "tokens"}, retry_after=1.5)
        async with client(router) as mesh:
            with pytest.raises(MeshError) as caught:
                await mesh.generate(prompt="hello")
        assert (caught.value.metadata, caught.value.retry_after) == ({"limit": "tokens"}, 1.5)

    async def test_closing_the_iterator_cancels_the_generation(self, router: ScriptedRouter) -> None:
        router.stalls_after = 2
        async with client(router) as mesh:
            async with contextlib.aclosing(mesh.stream(prompt="hello")) as events:
                async for event in events:
                    if isinstance(event, Text) and event.token_offset == 1:
                        break
            await asyncio.wait_for(router.cancelled.wait(), 60)

    async def test_the_deadline_ends_a_stream_that_stalls(self, router: ScriptedRouter) -> None:
        router.stalls_after = 2
        async with client(router) as mesh:
            with pytest.raises(MeshError) as caught:
                await collect(mesh, deadline=0.3)
        assert caught.value.reason is Reason.DEADLINE

    async def test_a_stream_without_its_last_message_is_no_answer(self, router: ScriptedRouter) -> None:
        router.cuts_the_end = True
        async with client(router) as mesh:
            with pytest.raises(MeshError, match="without its last message"):
                await collect(mesh)

    async def test_nobody_there_is_an_unavailable_mesh(self, router: ScriptedRouter) -> None:
        await router.stop()
        async with client(router) as mesh:
            with pytest.raises(MeshError) as caught:
                await collect(mesh)
        assert caught.value.reason is Reason.NO_REPLICA


@asynccontextmanager
async def door(target: str, resets: int) -> AsyncIterator[str]:
    """The way to a router for connections that come after the first so many, which are reset."""
    came = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        came += 1
        if came <= resets:
            writer.transport.abort()
            return
        back, forth = await asyncio.open_unix_connection(target.removeprefix("unix:"))
        await asyncio.gather(pump(reader, forth), pump(back, writer))

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert came > resets
    server.close()


async def test_a_connection_that_a_leaving_router_resets_is_made_again_and_the_call_sent_once(
    router: ScriptedRouter,
) -> None:
    async with door(router.target, resets=1) as target, AsyncMesh(target, key=KEY) as mesh:
        assert text_of(await collect(mesh)) == "".join(WORDS)
    async with door(router.target, resets=2) as target, AsyncMesh(target, key=KEY) as mesh:
        assert (await mesh.generate(prompt="hello")).text == "one"
    assert len(router.requests) == 1
    assert len(router.metadata) == 2


async def test_a_call_that_a_draining_router_refuses_is_made_again_and_not_for_ever(router: ScriptedRouter) -> None:
    router.refusal = MeshError(Reason.DRAINING, "another will answer")
    async with client(router) as mesh:
        asking = asyncio.ensure_future(collect(mesh))
        while not router.metadata:
            await asyncio.sleep(0.01)
        router.refusal = None
        assert text_of(await asking) == "".join(WORDS)
        router.refusal = MeshError(Reason.DRAINING, "nobody else is there")
        with pytest.raises(MeshError) as caught:
            await collect(mesh)
    assert caught.value.reason is Reason.DRAINING
    assert len(router.metadata) == 2 + 3


class TestResume:
    async def test_a_broken_stream_goes_on_without_a_gap_or_a_repeat(self, router: ScriptedRouter) -> None:
        router.breaks_after = [2, 4]
        async with client(router) as mesh:
            events = await collect(mesh, temperature=0.0, resumes=2)
        assert text_of(events) == "".join(WORDS)
        assert [request.resume_from for request in router.requests] == [0, 2, 4]
        # An alias or a route may lead elsewhere by then: half an answer is of the model that began it.
        assert [request.generation.model for request in router.requests] == ["", "scripted", "scripted"]
        assert [event.offset for event in events if isinstance(event, Start)] == [0, 2, 4]

    async def test_it_is_off_unless_asked_for(self, router: ScriptedRouter) -> None:
        router.breaks_after = [2]
        async with client(router) as mesh:
            with pytest.raises(MeshError) as caught:
                await collect(mesh, temperature=0.0)
        assert (caught.value.reason, len(router.requests)) == (Reason.ENGINE_LOST, 1)

    async def test_it_is_bounded(self, router: ScriptedRouter) -> None:
        router.breaks_after = [1, 1, 1]
        async with client(router) as mesh:
            with pytest.raises(MeshError):
                await collect(mesh, seed=7, resumes=1)
        assert len(router.requests) == 2

    async def test_of_several_choices_each_says_how_far_it_came(self, router: ScriptedRouter) -> None:
        router.breaks_after = [2]
        async with client(router) as mesh:
            await collect(mesh, resumes=1, temperature=0.0, n=2)  # the second never came to its first token
        assert [list(request.resume_from_choices) for request in router.requests] == [[], [2, 0]]
        assert [request.resume_from for request in router.requests] == [0, 0]

    async def test_what_is_drawn_is_asked_for_again_by_id_and_with_the_seed_that_was_told(
        self, router: ScriptedRouter
    ) -> None:
        router.breaks_after, router.seed = [2], 5
        async with client(router) as mesh:
            events = await collect(mesh, resumes=1)
        first, second = router.requests
        assert first.resumable
        assert not first.generation.sampling.HasField("seed")
        assert (second.resume_of, second.generation.sampling.seed) == ("r-1", 5)
        end = events[-1]
        assert isinstance(end, End)
        assert end.usage.completion_tokens == 2 + len(WORDS)  # of both streams, as the scripted router bills them

    async def test_a_refusal_is_not_resumed(self, router: ScriptedRouter) -> None:
        router.refusal = MeshError(Reason.PROMPT_UNSAFE, "no")
        async with client(router) as mesh:
            with pytest.raises(MeshError) as caught:
                await collect(mesh, temperature=0.0, resumes=3)
        assert (caught.value.reason, len(router.metadata)) == (Reason.PROMPT_UNSAFE, 1)


class TestUnary:
    async def test_choices_come_in_order_with_their_reasons(self, router: ScriptedRouter) -> None:
        async with client(router) as mesh:
            answer = await mesh.generate(prompt="hello", n=2)
        assert [choice.text for choice in answer.choices] == ["one", "two"]
        assert (answer.text, answer.end.finish_reasons) == ("one", {0: "length", 1: "length"})

    async def test_models_and_counts(self, router: ScriptedRouter) -> None:
        async with client(router) as mesh:
            route, model = await mesh.list_models()
            assert (model.name, model.ready_replicas, list(model.targets)) == ("scripted", 2, [])
            assert (route.name, list(route.targets)) == ("route", ["other", "scripted"])
            assert await mesh.count_tokens(prompt="a b c") == 3


class TestSync:
    async def test_it_says_what_the_async_client_says(self, router: ScriptedRouter) -> None:
        def use() -> tuple[list[Event], str, int]:
            with Mesh(router.target, key=KEY) as mesh:
                mesh.list_models()
                return (
                    list(mesh.stream(prompt="hello")),
                    mesh.generate(prompt="x").text,
                    mesh.count_tokens(prompt="a b"),
                )

        events, text, count = await asyncio.to_thread(use)
        assert (text_of(events), text, count) == ("".join(WORDS), "one", 2)

    async def test_closing_the_generator_cancels_the_generation(self, router: ScriptedRouter) -> None:
        router.stalls_after = 1

        def use() -> None:
            with Mesh(router.target, key=KEY) as mesh, contextlib.closing(mesh.stream(prompt="hello")) as events:
                next(events)

        await asyncio.to_thread(use)
        await asyncio.wait_for(router.cancelled.wait(), 60)


class TestGeneration:
    def test_every_sampling_keyword_reaches_its_field(self) -> None:
        said = Asked(
            temperature=0.5, top_p=0.75, top_k=3, min_p=0.25, repetition_penalty=1.5, presence_penalty=0.5,
            frequency_penalty=-0.5, seed=2**63, max_tokens=9, min_tokens=2, ignore_eos=True, logprobs=4, n=2,
        )  # fmt: skip
        sampling = generation(prompt="x", stop=["a"], stop_token_ids=[5], logit_bias={7: 1.5}, **said).sampling
        assert {name: getattr(sampling, name) for name in said} == said
        assert (list(sampling.stop), list(sampling.stop_token_ids), dict(sampling.logit_bias)) == (["a"], [5], {7: 1.5})
        # Nothing else is left that no keyword reaches.
        assert {field.name for field, _ in sampling.ListFields()} == {
            field.name for field in generation_pb2.Sampling.DESCRIPTOR.fields
        }

    def test_what_the_worker_is_to_remember_reaches_its_field(self) -> None:
        said = generation(prompt="x", kv="window", kv_tokens=512, kv_sinks=0).kv_policy
        assert said == generation_pb2.KvPolicy(mode=generation_pb2.KvPolicy.MODE_WINDOW, tokens=512, sinks=0)
        assert said.HasField("sinks")
        assert not generation(prompt="x").HasField("kv_policy")

    def test_what_was_not_said_stays_unset(self) -> None:
        made = generation(messages=[("user", "hi"), {"role": "user", "content": "ho", "name": "n"}])
        assert made.sampling.ListFields() == []
        assert [(turn.content, turn.name) for turn in made.input.chat.messages] == [("hi", ""), ("ho", "n")]

    def test_a_turn_may_bring_texts_of_others_along(self) -> None:
        page = {"text": "a page", "untrusted": True}
        made = generation(messages=[with_documents("Sum up:", ["a page"]), {"role": "user", "parts": [page]}])
        first, second = made.input.chat.messages
        assert [(part.text, part.untrusted) for part in first.parts] == [("Sum up:", False), ("a page", True)]
        assert [(part.text, part.untrusted) for part in second.parts] == [("a page", True)]

    @pytest.mark.parametrize(
        ("asked", "field"),
        [
            (Asked(), "input"),
            (Asked(prompt="a", token_ids=[1]), "input"),
            (Asked(token_ids=[-1]), "token_ids"),
            (Asked(messages=[{"role": "user", "text": "typo"}]), r"messages\[0\]"),
            (Asked(prompt="a", cache="never"), "cache"),  # type: ignore[typeddict-item]
            (Asked(prompt="a", top_k=-1), "top_k"),
            (Asked(prompt="a", kv="none"), "kv"),  # type: ignore[typeddict-item]
            (Asked(prompt="a", kv="window", kv_tokens=-1), "kv_tokens"),
        ],
    )
    def test_what_no_message_can_say_is_refused_with_its_field(self, asked: Asked, field: str) -> None:
        with pytest.raises(MeshError, match=rf"REQUEST_INVALID: {field}"):
            generation(**asked)
