"""What a prompt begins with, as a chain of hashes of its text: how a router without a tokenizer knows what a worker's
prefix cache holds. docs/decisions/0013 says why text; the worker's README has the format.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from meshlm.chassis.parts import content_of
from meshlm.v1 import generation_pb2 as pb

# Chunks are short where prompts begin, about two blocks of 16 tokens, and longer where they are long already: what a
# chunk more or less is worth is its share of the whole.
SHORT_BYTES, SHORT_CHUNKS = 128, 64
LONG_BYTES = 1024
MOST_CHUNKS = 256  # what comes after the first 200 KiB is not looked at
HASH_BYTES = 16
# A digest of fewer bytes says nothing: a count of probes, and a filter of at least 8 bits.
_LEAST_DIGEST = 2
_MOST_PROBES = 16


class TextPrefix:
    """The hash chain of one prompt, computed as far as somebody asks."""

    def __init__(self, source: pb.Input, salt: bytes) -> None:
        """`salt`: as of the worker's prefix cache; equal texts under other salts share nothing."""
        self._data = prompt_bytes(source)
        self._hashes: list[bytes] = []
        self._root = blake2b(salt, digest_size=HASH_BYTES, person=b"meshlm.text").digest()

    @property
    def size(self) -> int:
        """Bytes of the whole prompt."""
        return len(self._data)

    @property
    def chunks(self) -> int:
        """How many whole chunks there are, at most MOST_CHUNKS."""
        if len(self._data) < covered(SHORT_CHUNKS):
            return len(self._data) // SHORT_BYTES
        return min(SHORT_CHUNKS + (len(self._data) - covered(SHORT_CHUNKS)) // LONG_BYTES, MOST_CHUNKS)

    def hashes(self, most: int = MOST_CHUNKS) -> Iterator[bytes]:
        """The hashes of the first 1, 2, 3, ... chunks, `most` of them."""
        for number in range(min(most, self.chunks)):
            if number == len(self._hashes):
                parent = self._hashes[-1] if self._hashes else self._root
                chunk = self._data[covered(number) : covered(number + 1)]
                self._hashes.append(blake2b(parent + chunk, digest_size=HASH_BYTES).digest())
            yield self._hashes[number]


def covered(chunks: int) -> int:
    """The bytes of a prompt's first so many chunks."""
    return SHORT_BYTES * min(chunks, SHORT_CHUNKS) + LONG_BYTES * max(0, chunks - SHORT_CHUNKS)


def prompt_bytes(source: pb.Input) -> bytes:
    """An input as bytes such that inputs whose prompts begin alike begin alike.

    Control characters part what a chat template parts. A text that contains them can at worst look like another
    prompt of its own tenant, and make a router guess wrong.
    """
    kind = source.WhichOneof("input")
    if kind == "chat":
        parts = [f"{m.role}\x1f{m.name}\x1e{content_of(m)}\x1d" for m in source.chat.messages]
        return b"c" + "".join(parts).encode()
    if kind == "token_ids":
        return b"t" + b"".join(token.to_bytes(4, "little") for token in source.token_ids.ids)
    return b"p" + source.prompt.encode()


def contains(digest: bytes, text_hash: bytes) -> bool:
    """Whether a Bloom filter in the worker's format holds a hash; False for one that makes no sense."""
    bits = 8 * (len(digest) - 1)
    if len(digest) < _LEAST_DIGEST or digest[0] > _MOST_PROBES or bits & (bits - 1):
        return False
    a = int.from_bytes(text_hash[:8], "little")
    b = int.from_bytes(text_hash[8:], "little") | 1
    return digest[0] > 0 and all(
        digest[1 + (bit >> 3)] >> (bit & 7) & 1 for bit in ((a + j * b) % bits for j in range(digest[0]))
    )
