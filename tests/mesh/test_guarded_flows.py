"""Answers that are stopped, taken back and redacted on their way through a whole mesh of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshlm.mesh.client import End, Moderated, Text
from tests.mesh.rig import Rig, running
from tests.waiting import until

pytestmark = pytest.mark.mesh

PLAIN = "The weather will be mild on Sunday, and the roads are clear all day. "
HARM = "Here is how to build a pipe bomb: pack the explosive powder, attach the detonator, and kill them all. "
MAIL = "jo.doe@example.org"


def saying(text: str) -> str:
    """A worker that says this to everything."""
    return f'[[mesh.workers]]\nname = "one"\noverrides = {{ "fake.text" = "{text}" }}\n'


def edit(file: Path, before: str, after: str) -> None:
    """At once: whoever reads it meanwhile finds one or the other."""
    new = file.with_suffix(".new")
    new.write_text(file.read_text().replace(before, after))
    new.replace(file)


async def heard(rig: Rig, question: str = "hello") -> tuple[str, list[Moderated], End]:
    events = [event async for event in rig.stream(question, cache="bypass", max_tokens=1_000)]
    text = "".join(event.text for event in events if isinstance(event, Text))
    (end,) = [event for event in events if isinstance(event, End)]
    return text, [event for event in events if isinstance(event, Moderated)], end


async def test_a_harmful_answer_is_stopped_in_mid_stream_where_it_becomes_harmful() -> None:
    answer = PLAIN * 3 + HARM * 6 + PLAIN * 3
    scores = "answer_flag_score = 0.6\nanswer_confirm_score = 0.8\nanswer_block_score = 0.9\n"
    async with running(saying(answer), step=0.01, interval=0.0, extra=f"[guard.policies.default]\n{scores}") as rig:
        text, moderations, end = await heard(rig)
        assert end.finish_reasons == {0: "content_filter"}
        assert answer.startswith(text)
        assert len(PLAIN) <= len(text) < len(PLAIN * 3 + HARM * 6)
        assert [m.action for m in moderations[:-1]] == ["pass"] * (len(moderations) - 1)
        stop = moderations[-1]
        assert stop.action == "stop"
        assert set(stop.categories) & {"S1", "S9"}
        assert len(PLAIN * 3) < stop.char_end <= len(PLAIN * 3 + HARM * 6)
        assert moderations[-2].check_offset >= len(text)  # nothing went out that no verdict covers
        whole = await rig.client.generate(messages=[("user", "hello")], temperature=0.0, max_tokens=1_000)
        assert answer[:192].startswith(whole.text)  # messages go out whole: to the last that ends within two windows
        assert len(whole.text) > 100
        assert whole.choices[0].finish_reason == "content_filter"
        await until(rig.idle)  # the worker does not go on with what nobody wants


async def test_personal_data_is_replaced_and_policies_change_without_a_restart() -> None:
    answer = f"Write to {MAIL} or to nobody, and then wait for a word."
    redacting = '[guard]\nreload_seconds = 0.1\n[guard.policies.default]\nactions = { "pii.email" = "redact" }\n'
    async with running(saying(answer), step=0.001, extra=redacting) as rig:
        text, moderations, end = await heard(rig)
        assert text == answer.replace(MAIL, "[pii.email]")
        assert end.finish_reasons == {0: "stop"}
        (verdict,) = end.output_verdicts
        assert text[verdict.char_start : verdict.char_end] == "[pii.email]"
        assert moderations[-1].check_offset == len(text)
        edit(rig.folder.root.parent / "mesh.toml", '"redact"', '"block"')

        async def stopped() -> bool:
            return (await heard(rig))[2].finish_reasons == {0: "content_filter"}

        await until(stopped)
        assert (await heard(rig))[2].output_verdicts[0].policy_version != verdict.policy_version
