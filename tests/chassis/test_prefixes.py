"""The hash chain of a prompt's text."""

from __future__ import annotations

from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from meshlm.chassis.prefixes import TextPrefix, contains, covered, prompt_bytes
from meshlm.v1 import generation_pb2 as pb


def chat(*turns: tuple[str, str]) -> pb.Input:
    return pb.Input(chat=pb.Chat(messages=[pb.Message(role=role, content=content) for role, content in turns]))


def hashes(source: pb.Input, salt: bytes = b"s") -> list[bytes]:
    return list(TextPrefix(source, salt).hashes())


@given(st.text(max_size=600), st.text(max_size=600), st.text(max_size=600))
def test_conversations_share_exactly_the_chunks_of_their_common_beginning(same: str, one: str, other: str) -> None:
    first = chat(("system", same), ("user", one))
    second = chat(("system", same), ("user", other))
    left, right = hashes(first), hashes(second)
    data = [prompt_bytes(first), prompt_bytes(second)]
    shared = next((i for i, (a, b) in enumerate(zip(*data, strict=False)) if a != b), min(map(len, data)))
    for number, (a, b) in enumerate(zip(left, right, strict=False), start=1):
        assert (a == b) is (covered(number) <= shared)


def test_a_longer_conversation_begins_with_its_shorter_self() -> None:
    turns = [("user", "x" * 300), ("assistant", "y" * 300), ("user", "z" * 300)]
    assert hashes(chat(*turns))[: len(hashes(chat(*turns[:2])))] == hashes(chat(*turns[:2]))


def test_another_salt_shares_nothing() -> None:
    source = pb.Input(prompt="p" * 1000)
    assert not set(hashes(source, b"one")) & set(hashes(source, b"two"))


def test_the_chain_is_the_one_that_the_readme_describes() -> None:
    parent = blake2b(b"s", digest_size=16, person=b"meshlm.text").digest()
    data = b"p" + b"q" * 300
    expected = []
    for start in (0, 128):
        parent = blake2b(parent + data[start : start + 128], digest_size=16).digest()
        expected.append(parent)
    assert hashes(pb.Input(prompt="q" * 300)) == expected


@given(st.binary(max_size=64), st.binary(min_size=16, max_size=16))
def test_a_digest_that_makes_no_sense_is_no_error(digest: bytes, text_hash: bytes) -> None:
    assert contains(digest, text_hash) in (True, False)


@given(st.integers(0, 400_000))
def test_chunks_lie_side_by_side_and_never_beyond_the_text(size: int) -> None:
    prefix = TextPrefix(pb.Input(prompt="x" * size), b"")
    count = prefix.chunks
    assert covered(count) <= prefix.size
    assert count == 256 or covered(count + 1) > prefix.size
    assert sum(1 for _ in prefix.hashes()) == count


def test_an_empty_digest_and_one_without_probes_hold_nothing() -> None:
    assert not contains(b"", b"h" * 16)
    assert not contains(b"\0" + b"\xff" * 8, b"h" * 16)
    assert not contains(b"\x04" + b"\xff" * 7, b"h" * 16)  # no power of two
