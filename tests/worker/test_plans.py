from __future__ import annotations

from typing import Any

import msgspec
import pytest

from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.engine.budgets import Budgets
from meshlm.worker.fake import END, FakeRunner, FakeSettings
from meshlm.worker.fake_tokenizer import fake_tokenizer
from meshlm.worker.front.plans import Plan, make_plan
from meshlm.worker.front.prompts import Prompts
from meshlm.worker.messages import KvBudget, ModelFacts, Sampling

FACTS = FakeRunner(FakeSettings(max_context=64, total_blocks=4)).facts
PROMPTS = Prompts(fake_tokenizer())


BUDGETED = msgspec.structs.replace(FACTS, kv_budgets=True, max_context=256, total_blocks=8)
BUDGETS = Budgets(block_size=16, chunk_tokens=32)
WINDOW = pb.KvPolicy(mode=pb.KvPolicy.MODE_WINDOW, tokens=64)


async def plan_of(prompt: str = "hello", seconds: float | None = None, **sampling: Any) -> Plan:
    generation = pb.Generation(input=pb.Input(prompt=prompt), sampling=pb.Sampling(**sampling))
    request = worker_pb2.RunGenerationRequest(generation=generation, cache_salt=b"salt", tenant="acme")
    return await make_plan(request, PROMPTS, FACTS, BUDGETS, "fake", seconds)


async def kept(policy: pb.KvPolicy, prompt: str = "hello", facts: ModelFacts = BUDGETED) -> Plan:
    generation = pb.Generation(input=pb.Input(prompt=prompt), kv_policy=policy)
    return await make_plan(
        worker_pb2.RunGenerationRequest(generation=generation), PROMPTS, facts, BUDGETS, "fake", None
    )


async def test_unset_fields_take_the_neutral_values_of_the_contract() -> None:
    plan = await plan_of(seed=3)
    assert plan.sampling == Sampling(
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        seed=3,
        logprobs=None,
    )
    assert (plan.choices, plan.limits.max_tokens, plan.limits.deadline) == (1, 59, None)
    assert plan.limits.stop_token_ids == {END}


async def test_set_fields_reach_the_engine_even_where_they_are_zero() -> None:
    plan = await plan_of(temperature=0, top_k=5, logit_bias={7: -1.5}, logprobs=0, stop=["x"], min_tokens=2)
    assert (plan.sampling.temperature, plan.sampling.top_k, plan.sampling.logprobs) == (0.0, 5, 0)
    assert plan.sampling.logit_bias == {7: -1.5}
    assert (plan.stops, plan.limits.min_tokens) == (("x",), 2)


async def test_a_top_k_beyond_an_engines_integers_keeps_all_tokens() -> None:
    plan = await plan_of(top_k=2**32 - 1)
    assert 10**9 < plan.sampling.top_k < 2**31


async def test_requests_without_a_seed_do_not_repeat_each_other() -> None:
    assert (await plan_of()).sampling.seed != (await plan_of()).sampling.seed


async def test_choices_differ_in_seed_alone_and_the_largest_seed_wraps() -> None:
    plan = await plan_of(seed=2**64 - 1, n=2)
    first, second = plan.submit("a", 0, admitted=False), plan.submit("b", 1, admitted=True)
    assert (first.sampling.seed, second.sampling.seed) == (2**64 - 1, 0)
    assert (first.admitted, second.admitted) == (False, True)
    assert (first.prompt, first.cache_salt, first.tenant) == (second.prompt, b"salt", "acme")


async def test_ignoring_the_end_keeps_only_the_callers_stop_tokens() -> None:
    assert (await plan_of(ignore_eos=True, stop_token_ids=[5])).limits.stop_token_ids == {5}


async def test_an_input_that_fills_the_context_is_refused_and_one_token_less_is_not() -> None:
    with pytest.raises(MeshError) as caught:
        await plan_of("x" * 64)
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    assert (await plan_of("x" * 63, max_tokens=9)).limits.max_tokens == 1


async def test_a_kv_policy_reaches_the_engine_with_its_defaults() -> None:
    assert (await kept(WINDOW)).submit("a", 0, admitted=False).kv == KvBudget(policy="window", tokens=64, sinks=16)
    bare = pb.KvPolicy(mode=pb.KvPolicy.MODE_WINDOW, tokens=64, sinks=0)
    assert (await kept(bare)).submit("a", 0, admitted=False).kv == KvBudget(policy="window", tokens=64, sinks=0)
    important = pb.KvPolicy(mode=pb.KvPolicy.MODE_IMPORTANCE, tokens=90)
    assert (await kept(important)).submit("a", 0, admitted=False).kv == KvBudget(policy="importance", tokens=90)
    assert (await kept(pb.KvPolicy(mode=pb.KvPolicy.MODE_FULL))).submit("a", 0, admitted=False).kv is None


async def test_with_a_kv_budget_the_model_and_not_the_memory_limits_the_length() -> None:
    assert (await kept(WINDOW, "x" * 200)).limits.max_tokens == 56  # 256 less 200; the 8 blocks hold 128 tokens
    with pytest.raises(MeshError) as caught:
        await kept(pb.KvPolicy(), "x" * 200)
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG


async def test_by_importance_an_input_must_fit_the_memory_and_its_answer_need_not() -> None:
    policy = pb.KvPolicy(mode=pb.KvPolicy.MODE_IMPORTANCE, tokens=64)
    assert (await kept(policy, "x" * 128)).limits.max_tokens == 128  # 256 less 128; the 8 blocks hold 128 tokens
    with pytest.raises(MeshError) as caught:
        await kept(policy, "x" * 129)
    assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    assert caught.value.metadata["max_context"] == "129"


@pytest.mark.parametrize("tokens", [96, 97])
async def test_a_budget_for_which_there_is_no_room_beside_a_chunk_is_refused(tokens: int) -> None:
    policy = pb.KvPolicy(mode=pb.KvPolicy.MODE_WINDOW, tokens=tokens)  # 8 blocks of 16, and chunks of 32 tokens
    if tokens == 96:
        assert (await kept(policy)).kv is not None
        return
    with pytest.raises(MeshError) as caught:
        await kept(policy)
    assert caught.value.metadata["field"] == "generation.kv_policy.tokens"


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (pb.KvPolicy(mode=9), "mode"),  # type: ignore[arg-type]
        (pb.KvPolicy(tokens=64), "tokens"),
        (pb.KvPolicy(mode=pb.KvPolicy.MODE_FULL, tokens=64), "tokens"),
        (pb.KvPolicy(mode=pb.KvPolicy.MODE_WINDOW), "tokens"),
        (pb.KvPolicy(mode=pb.KvPolicy.MODE_WINDOW, tokens=63), "tokens"),
        (pb.KvPolicy(mode=pb.KvPolicy.MODE_IMPORTANCE, tokens=(1 << 20) + 1), "tokens"),
        (pb.KvPolicy(mode=pb.KvPolicy.MODE_WINDOW, tokens=64, sinks=33), "sinks"),
        (pb.KvPolicy(mode=pb.KvPolicy.MODE_IMPORTANCE, tokens=1 << 20), "tokens"),
        (pb.KvPolicy(mode=pb.KvPolicy.MODE_IMPORTANCE, tokens=64, sinks=1), "sinks"),
        (pb.KvPolicy(sinks=0), "sinks"),
    ],
)
async def test_a_kv_policy_that_says_nothing_sensible_is_refused_with_its_field(
    policy: pb.KvPolicy, field: str
) -> None:
    with pytest.raises(MeshError) as caught:
        await kept(policy)
    assert (caught.value.reason, caught.value.metadata["field"]) == (
        Reason.REQUEST_INVALID,
        f"generation.kv_policy.{field}",
    )


async def test_an_engine_that_keeps_all_tokens_refuses_a_budget() -> None:
    with pytest.raises(MeshError) as caught:
        await kept(WINDOW, facts=msgspec.structs.replace(BUDGETED, kv_budgets=False))
    assert caught.value.metadata["field"] == "generation.kv_policy.mode"


async def test_control_tokens_count_only_in_prompts_of_those_who_may_write_them() -> None:
    source = pb.Input(prompt="a<|end|>")
    assert await PROMPTS.encode(source, control_tokens=False, vocab_size=257) == list(b"a<|end|>")
    assert await PROMPTS.encode(source, control_tokens=True, vocab_size=257) == [97, END]


async def test_a_long_input_is_encoded_to_the_same_tokens_as_a_short_one() -> None:
    long = "word " * 2000  # goes to a thread
    assert await PROMPTS.encode(pb.Input(prompt=long), control_tokens=False, vocab_size=257) == list(long.encode())


async def test_a_chat_may_be_left_open_for_the_caller_to_continue() -> None:
    chat = pb.Chat(messages=[pb.Message(role="user", content="hi")], add_generation_prompt=False)
    tokens = await PROMPTS.encode(pb.Input(chat=chat), control_tokens=False, vocab_size=257)
    assert tokens == [*b"<user>hi", END]


async def test_a_tokenizer_with_more_tokens_than_the_model_cannot_harm_the_engine() -> None:
    chat = pb.Chat(messages=[pb.Message(role="user", content="hi")])  # its template writes END
    with pytest.raises(MeshError) as caught:
        await PROMPTS.encode(pb.Input(chat=chat), control_tokens=False, vocab_size=END)
    assert caught.value.metadata["field"] == "generation.input.chat"
    request = worker_pb2.RunGenerationRequest(generation=pb.Generation(input=pb.Input(prompt="hi")))
    smaller = msgspec.structs.replace(FACTS, vocab_size=END)
    assert (await make_plan(request, PROMPTS, smaller, BUDGETS, "fake", None)).limits.stop_token_ids == frozenset()
