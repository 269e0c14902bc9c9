"""Which beginnings of texts the prefix cache holds, for routers that have no tokenizer.

The engine knows its cache by token blocks. The front, which encodes every prompt, notes for each chunk of a prompt's
text (`chassis/prefixes.py`) the token block in which that chunk ends. A chunk is told as cached while its block is: so
what is evicted disappears here too, without a message more from the engine.

Where in the tokens a chunk ends is taken in proportion of bytes. That may be some blocks off where a prompt mixes
scripts; a router then expects that many tokens too many or too few, and nothing else depends on it.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from meshlm.chassis.prefixes import TextPrefix, covered
from meshlm.worker.engine.blocks import extend_chain
from meshlm.worker.engine.digest import LARGEST_BITS, PROBES, SMALLEST_BITS

# Chunks remembered, least recently used first to go. At 8 bits each the digest errs in under 3% of cases.
MOST = LARGEST_BITS // 8

Words = npt.NDArray[np.uint64]


def text_blocks(prefix: TextPrefix, prompt: list[int], block_size: int, salt: bytes) -> list[tuple[bytes, bytes]]:
    """Each chunk's hash, with that of the block in which it ends. Blocks that are not full are no blocks."""
    full = len(prompt) // block_size
    if not full or not prefix.chunks:
        return []
    blocks: list[bytes] = []
    pairs = []
    for number, text_hash in enumerate(prefix.hashes(), start=1):
        tokens = covered(number) * len(prompt) // prefix.size
        wanted = max(1, tokens // block_size)
        if wanted > full:
            break
        extend_chain(blocks, prompt, wanted, block_size, salt)
        pairs.append((text_hash, blocks[wanted - 1]))
    return pairs


class TextPrefixes:
    """A table of chunks, and the Bloom filter over those whose block is cached."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._text = np.zeros((2, most), np.uint64)
        self._block = np.zeros((2, most), np.uint64)
        self._told: tuple[bytes, bytes] | None = None  # the engine's digest, and what follows from it

    def note(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """A prompt is on its way to the engine. `pairs` come from `text_blocks`."""
        for text_hash, block_hash in pairs:
            slot = self._slots.get(text_hash)
            if slot is None:
                slot = len(self._slots) if len(self._slots) < self._most else self._slots.popitem(last=False)[1]
                self._slots[text_hash] = slot
                self._text[:, slot] = _words(text_hash)
            else:
                self._slots.move_to_end(text_hash)
            self._block[:, slot] = _words(block_hash)
        if pairs:
            self._told = None

    def digest(self, blocks: bytes) -> bytes:
        """The text digest that goes with the engine's digest of blocks, in the same format. The same object while
        neither changes."""
        if self._told is None or self._told[0] != blocks:
            self._told = (blocks, self._filter(blocks))
        return self._told[1]

    def _filter(self, blocks: bytes) -> bytes:
        count = len(self._slots)
        held = np.unpackbits(np.frombuffer(blocks, np.uint8, offset=1), bitorder="little") if blocks else np.zeros(8)
        present = np.ones(count, bool)
        for bit in _probes(self._block[:, :count], len(held), blocks[0] if blocks else 1):
            present &= held[bit] == 1
        told = self._text[:, :count][:, present]
        bits = np.zeros(max(SMALLEST_BITS, 1 << (8 * told.shape[1] - 1).bit_length()), np.uint8)
        for bit in _probes(told, len(bits), PROBES):
            bits[bit] = 1
        return bytes([PROBES]) + np.packbits(bits, bitorder="little").tobytes()


def _words(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") | 1


def _probes(hashes: Words, bits: int, count: int) -> list[npt.NDArray[np.int64]]:
    """`bits` is a power of two: sums that wrap at 2^64 have the same remainder."""
    return [((hashes[0] + np.uint64(j) * hashes[1]) & np.uint64(bits - 1)).astype(np.int64) for j in range(count)]
