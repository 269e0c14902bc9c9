"""What the front tells of its prompts' texts."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from meshlm.chassis.prefixes import TextPrefix, contains
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.engine.blocks import BlockPool, extend_chain
from meshlm.worker.engine.digest import contains as block_contains
from meshlm.worker.front.text_prefixes import TextPrefixes, text_blocks
from tests.worker.workers import running

SALT = b"salt"


def prefix(text: str) -> TextPrefix:
    return TextPrefix(pb.Input(prompt=text), SALT)


def tokens(text: str) -> list[int]:
    return list(text.encode())


def cached(pool: BlockPool, text: str) -> list[int]:
    """Computes a text, as the engine does, and returns its blocks."""
    chain: list[bytes] = []
    extend_chain(chain, tokens(text), len(text) // 16, 16, SALT)
    got = pool.acquire(chain, len(chain))
    assert got is not None
    blocks, known = got
    for number in range(known, len(blocks)):
        pool.publish(blocks[number], chain[number], blocks[number - 1] if number else None)
    return blocks


def found(digest: bytes, text: str) -> int:
    count = 0
    for text_hash in prefix(text).hashes():
        if not contains(digest, text_hash):
            break
        count += 1
    return count


def test_what_is_computed_is_told_and_what_is_evicted_is_not() -> None:
    pool, table = BlockPool(64), TextPrefixes()
    text = "".join(random.Random(1).choices("abcdef", k=900))  # 56 blocks of 64
    table.note(text_blocks(prefix(text), tokens(text), 16, SALT))
    assert found(table.digest(pool.digest), text) == 0  # not computed yet
    pool.release(cached(pool, text))
    assert found(table.digest(pool.digest), text) == 7  # 900 bytes hold 7 whole chunks
    assert found(table.digest(pool.digest), text[:400] + "z" * 500) == 3
    other = "z" * 900
    pool.release(cached(pool, other))  # takes nearly all blocks
    assert found(table.digest(pool.digest), text) < 7


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_a_table_that_is_full_forgets_its_oldest_and_tells_the_others_right(order: list[int]) -> None:
    table = TextPrefixes(most=8)
    latest: dict[bytes, bytes] = {}
    for number in order:
        text_hash, block_hash = number.to_bytes(16, "little"), (number + 100).to_bytes(16, "big")
        table.note([(text_hash, block_hash)])
        latest.pop(text_hash, None)
        latest[text_hash] = block_hash
    every = b"\x04" + b"\xff" * 128  # a digest that holds all blocks
    digest = table.digest(every)
    assert all(contains(digest, text_hash) for text_hash in list(latest)[-8:])
    none = b"\x04" + b"\0" * 128
    assert not any(contains(table.digest(none), text_hash) for text_hash in latest)


def test_every_chunk_is_held_by_a_block_of_its_own_prompt() -> None:
    text = "word " * 400
    chain: list[bytes] = []
    extend_chain(chain, tokens(text), len(text) // 16, 16, SALT)
    pairs = text_blocks(prefix(text), tokens(text), 16, SALT)
    # 128 bytes are 8 blocks here, and one byte more than the tokens says what kind of input it is.
    assert [chain.index(block) for _, block in pairs] == [8 * n + 6 for n in range(15)]


def test_a_prompt_of_less_than_a_block_has_nothing_to_tell() -> None:
    assert text_blocks(prefix("x" * 200), [1, 2, 3], 16, SALT) == []


async def test_a_worker_tells_the_text_that_it_has_cached() -> None:
    async with running() as worker:
        text = "A long beginning that many prompts share, word for word. " * 8
        request = worker_pb2.RunGenerationRequest(
            request_id="r",
            generation=pb.Generation(input=pb.Input(prompt=text), sampling=pb.Sampling(max_tokens=2)),
            cache_salt=SALT,
        )
        async for _ in worker.stub.RunGeneration(request, timeout=120):
            pass
        await worker.until(lambda state: found(state.text_digest, text) == len(text) // 128)
        state = await worker.state()
        assert found(state.text_digest, text[:300] + "?" * 300) == 2
        foreign = TextPrefix(pb.Input(prompt=text), b"another tenant")
        assert not contains(state.text_digest, next(foreign.hashes()))
        chain: list[bytes] = []
        extend_chain(chain, tokens(text), 1, 16, SALT)
        assert block_contains(state.prefix_digest, chain[0])
