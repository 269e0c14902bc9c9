from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.worker.engine.blocks import BlockPool, block_hash, extend_chain, root_hash
from meshlm.worker.engine.digest import Digest, contains


def chain(tokens: list[int], salt: bytes = b"", block_size: int = 4) -> list[bytes]:
    hashes: list[bytes] = []
    extend_chain(hashes, tokens, len(tokens) // block_size, block_size, salt)
    return hashes


def filled(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    """A table whose full blocks are computed and findable."""
    hashes = chain(tokens, salt)
    acquired = pool.acquire(hashes, len(hashes))
    assert acquired is not None
    publish(pool, acquired[0], hashes)
    return acquired[0]


def publish(pool: BlockPool, table: list[int], hashes: list[bytes]) -> None:
    for block, prefix_hash, parent in zip(table, hashes, [None, *table[:-1]], strict=True):
        pool.publish(block, prefix_hash, parent)


def test_hashes_are_the_bytes_that_routers_are_told() -> None:
    root = blake2b(b"tenant", digest_size=16, person=b"meshlm.prefix").digest()
    first = blake2b(root + struct.pack("<4I", 1, 2, 3, 70000), digest_size=16).digest()
    second = blake2b(first + struct.pack("<4I", 5, 6, 7, 8), digest_size=16).digest()
    assert chain([1, 2, 3, 70000, 5, 6, 7, 8, 9], b"tenant") == [first, second]


def test_equal_tokens_behind_different_prefixes_or_salts_are_not_shared() -> None:
    assert chain([1] * 4 + [9] * 4)[1] != chain([2] * 4 + [9] * 4)[1]
    assert chain([1] * 4, b"a") != chain([1] * 4, b"b")
    assert root_hash(b"") != root_hash(b"\0")
    assert block_hash(b"\0" * 16, [1, 2]) != block_hash(b"\0" * 16, [2, 1])


def test_released_prefix_is_found_again_and_costs_no_block() -> None:
    pool = BlockPool(4)
    table = filled(pool, list(range(12)))
    pool.release(table)
    assert (pool.free, pool.cached) == (4, 3)
    again = pool.acquire(chain(list(range(12))), 4)
    assert again is not None
    assert again[0][:3] == table
    assert again[1] == 3
    assert pool.free == 0


def test_too_few_free_blocks_change_nothing() -> None:
    pool = BlockPool(4)
    table = filled(pool, list(range(8)))
    pool.release(table)
    assert pool.acquire(chain(list(range(8))), 5) is None  # 2 cached, 3 missing, 2 free besides them
    assert pool.free == 4
    assert [pool.holders(block) for block in table] == [0, 0]


def test_tail_of_the_oldest_prefix_is_given_away_first() -> None:
    pool = BlockPool(4)
    old, new = filled(pool, [1] * 8), filled(pool, [2] * 8)
    pool.release(old)
    pool.release(new)
    taken = pool.acquire([], 3)
    assert taken is not None
    assert taken[0] == [old[1], old[0], new[1]]
    assert pool.cached == 1


def test_second_copy_of_a_prefix_does_not_hide_the_first() -> None:
    pool = BlockPool(2)
    [prefix_hash] = chain([1, 2, 3, 4])
    table = pool.acquire([], 2)
    assert table is not None
    pool.publish(table[0][0], prefix_hash, None)
    pool.publish(table[0][1], prefix_hash, None)
    pool.release(table[0])
    assert pool.cached == 1
    again = pool.acquire([prefix_hash], 1)
    assert again == ([table[0][0]], 1)


def test_what_is_computed_behind_a_second_copy_does_not_outlive_the_way_to_it() -> None:
    pool = BlockPool(6)
    first = pool.acquire([], 1)
    second = pool.acquire([], 2)
    assert first is not None
    assert second is not None
    hashes = chain([1] * 8)
    publish(pool, first[0], hashes[:1])
    publish(pool, second[0], hashes)  # computed at the same time: a copy, and a block behind it
    assert pool.known(hashes) == 1
    pool.release(second[0])
    pool.release(first[0])
    assert pool.acquire([], 6) is not None
    assert pool.cached == 0


@given(st.lists(st.tuples(st.sampled_from(["acquire", "copy", "release", "blank"]), st.integers(0, 30)), max_size=80))
def test_a_cached_block_is_never_given_away_before_one_behind_it(steps: list[tuple[str, int]]) -> None:
    pool = BlockPool(10)
    chains = [chain(tokens) for tokens in ([1] * 20, [1] * 8 + [2] * 12, [1] * 8 + [2] * 4 + [3] * 4, [4] * 16)]
    tables: list[list[int]] = []
    for kind, number in steps:
        hashes = chains[number % 4][: 1 + number // 4 % 5]
        if kind == "release":
            if tables:
                pool.release(tables.pop(number % len(tables)))
            continue
        acquired = pool.acquire(hashes if kind == "acquire" else [], len(hashes))
        if acquired is not None:
            tables.append(acquired[0])
            if kind != "blank":
                publish(pool, acquired[0], hashes)
        reachable = {prefix_hash for hashes in chains for prefix_hash in hashes[: pool.known(hashes)]}
        assert pool.cached == len(reachable)


def test_what_is_retracted_is_not_found_and_goes_back_like_any_other() -> None:
    pool = BlockPool(4)
    hashes = chain([1] * 8)
    table = filled(pool, [1] * 8)
    shared = pool.acquire(hashes, 2)
    assert shared == (table, 2)
    pool.retract(table)
    assert pool.known(hashes) == 0
    assert [pool.holders(block) for block in table] == [2, 2]
    pool.release(table)
    pool.release(shared[0])
    assert pool.free == 4
    assert pool.cached == 0
    again = pool.acquire(hashes, 2)
    assert again is not None
    publish(pool, again[0], hashes)
    assert pool.known(hashes) == 2


def test_freeing_twice_is_noticed() -> None:
    pool = BlockPool(2)
    table = pool.acquire([], 1)
    assert table is not None
    pool.release(table[0])
    with pytest.raises(RuntimeError, match="freed twice"):
        pool.release(table[0])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.sampled_from([b"", b"a"])), max_size=60))
def test_blocks_are_held_exactly_by_the_tables_that_name_them(steps: list[tuple[int, int, bytes]]) -> None:
    pool = BlockPool(8)
    tables: list[tuple[list[int], list[int], bytes]] = []
    for kind, length, salt in steps:
        if kind == 0 and tables:
            pool.release(tables.pop(length % len(tables))[0])
        else:
            tokens = [kind] * 4 * length
            acquired = pool.acquire(chain(tokens, salt), length)
            if acquired is not None:
                publish(pool, acquired[0], chain(tokens, salt))
                tables.append((acquired[0], tokens, salt))
        held = [block for table, _, _ in tables for block in table]
        assert [pool.holders(block) for block in range(8)] == [held.count(block) for block in range(8)]
        assert pool.free == 8 - len(set(held))
        content: dict[int, tuple[list[int], bytes]] = {}
        for table, tokens, salt_ in tables:
            for i, block in enumerate(table):
                assert content.setdefault(block, (tokens[: 4 * i + 4], salt_)) == (tokens[: 4 * i + 4], salt_)


@given(st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=200), st.data())
def test_digest_never_misses_a_member(hashes: list[bytes], data: st.DataObject) -> None:
    digest = Digest(200)
    for prefix_hash in hashes:
        digest.add(prefix_hash)
    gone = data.draw(st.sets(st.sampled_from(hashes))) if hashes else set()
    for prefix_hash in gone:
        digest.remove(prefix_hash)
    assert all(contains(bytes(digest), prefix_hash) for prefix_hash in hashes if prefix_hash not in gone)
    if gone == set(hashes):
        assert not any(bytes(digest)[1:])


def test_digest_is_made_anew_only_when_something_changed() -> None:
    pool = BlockPool(4)
    empty = pool.digest
    table = filled(pool, [1] * 4)
    full = pool.digest
    pool.release(table)
    assert pool.digest is full != empty
    assert pool.acquire([], 4) is not None
    assert pool.digest == empty


def test_digest_rarely_claims_what_it_does_not_hold() -> None:
    digest = Digest(1000)
    for i in range(1000):
        digest.add(block_hash(b"", [i]))
    assert len(bytes(digest)) == 1 + 1024  # 8 bits a member, rounded up to a power of two
    false = sum(contains(bytes(digest), block_hash(b"", [i])) for i in range(1000, 11000))
    assert false < 300  # theory: (1 - exp(-4 * 1000 / 8192)) ** 4 = 2.2%
