"""Who holds which block of the KV cache, and which prefix is known to be in it. The memory itself is the runner's.

A block is blank (free, nothing known in it), in use (one holder or more), or idle (free, but its content is known, so
a new sequence with the same prefix may take it up again). Idle blocks are given away last, least recently used first.

The prefix cache is a radix tree whose edges are full blocks (SGLang's radix attention, by blocks; vLLM's "automatic
prefix caching"), with a salt at the root: a block is shared only among sequences with equal salt and equal tokens up to
its end. A node is found by the hash of the chain of blocks from the root to it, so a lookup is one step down the tree a
block, and the tree needs no pointers. `digest.py` gives the exact bytes that are hashed.

Leaves are given away first, least recently used: a holder of a node holds all nodes above it, and releases tails first,
so a node never becomes idle before one below it.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence as Items
from hashlib import blake2b

from meshlm.worker.engine.digest import Digest

HASH_BYTES = 16


def root_hash(salt: bytes) -> bytes:
    """The parent of a first block. Keyed by the tenant's salt, so that hashes cannot be guessed across tenants."""
    return blake2b(salt, digest_size=HASH_BYTES, person=b"meshlm.prefix").digest()


def block_hash(parent: bytes, tokens: Items[int]) -> bytes:
    """The hash of a full block behind the block with hash `parent`. Token ids are in [0, 2**32)."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=HASH_BYTES).digest()


def extend_chain(hashes: list[bytes], tokens: list[int], blocks: int, block_size: int, salt: bytes) -> None:
    """Appends to `hashes` until it covers the first `blocks` full blocks of `tokens`."""
    for i in range(len(hashes), blocks):
        parent = hashes[-1] if hashes else root_hash(salt)
        hashes.append(block_hash(parent, tokens[i * block_size : (i + 1) * block_size]))


class BlockPool:
    """Reference-counted blocks `0 .. total - 1`."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._holders = [0] * total
        self._hash: list[bytes | None] = [None] * total
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(total - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._digest = Digest(total)

    @property
    def free(self) -> int:
        """Blocks that nobody holds, blank or idle."""
        return len(self._blank) + len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks whose prefix is known, in use or idle."""
        return len(self._by_hash)

    @property
    def digest(self) -> bytes:
        """A Bloom filter over the known prefixes, see `digest.py`. The same object until something changes."""
        return bytes(self._digest)

    def holders(self, block: int) -> int:
        return self._holders[block]

    def acquire(self, hashes: list[bytes], count: int) -> tuple[list[int], int] | None:
        """A table of `count` blocks whose head is the longest cached run of `hashes`; also how many were cached.

        None, and nothing changed, where there are too few free blocks. `len(hashes)` is at most `count`.
        """
        shared = self._match(hashes)
        revived = sum(self._holders[block] == 0 for block in shared)
        if self.free - revived < count - len(shared):
            return None
        for block in shared:
            if self._holders[block] == 0:
                del self._idle[block]
            self._holders[block] += 1
        return shared + [self._take() for _ in range(count - len(shared))], len(shared)

    def release(self, blocks: list[int]) -> None:
        """Gives up one hold on each block of a table. Tails go first, so that they are also given away first."""
        for block in reversed(blocks):
            if self._holders[block] <= 0:
                raise RuntimeError(f"block {block} was freed twice")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._hash[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def known(self, hashes: list[bytes]) -> int:
        """How many blocks `acquire` would find cached."""
        return len(self._match(hashes))

    def publish(self, block: int, prefix_hash: bytes, parent: int | None) -> None:
        """Makes a full, computed block findable, behind the block `parent` of the same table (None: the first).

        Where another block has this prefix already, that one stays it; and what is computed behind such a second copy
        is not findable either, or it could outlive the way to it.
        """
        if prefix_hash not in self._by_hash and (parent is None or self._hash[parent] is not None):
            self._by_hash[prefix_hash] = block
            self._hash[block] = prefix_hash
            self._digest.add(prefix_hash)

    def retract(self, blocks: list[int]) -> None:
        """What a table's blocks hold cannot be relied upon: none of them is findable any more. Their holders keep them.

        What others have published behind them is not found either, unless the way there is published anew.
        """
        for block in blocks:
            self._forget(block)

    def _match(self, hashes: list[bytes]) -> list[int]:
        found: list[int] = []
        for prefix_hash in hashes:
            block = self._by_hash.get(prefix_hash)
            if block is None:
                break
            found.append(block)
        return found

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    def _forget(self, block: int) -> None:
        prefix_hash = self._hash[block]
        if prefix_hash is not None:
            del self._by_hash[prefix_hash]
            self._hash[block] = None
            self._digest.remove(prefix_hash)
