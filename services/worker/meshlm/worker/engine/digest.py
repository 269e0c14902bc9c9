"""Which prefixes this worker holds, in a kilobyte or so: a Bloom filter that routers can query.

Format of a digest (a router reads it without importing this file):

- byte 0: the number of probes `k`; the other bytes: the filter, `m = 8 * (len(digest) - 1)` bits, a power of two;
  bit `i` is bit `i % 8` (least significant first) of filter byte `i // 8`.
- a member is a 16-byte prefix hash (`blocks.py`): `a` is its first 8 bytes and `b` its last 8, both little-endian
  and unsigned; it is present if all bits `(a + j * b) % m` for `j` in `0 .. k-1` are set, with `b` made odd first.

The prefix hash of a block is `blake2b(parent + tokens)` with 16 bytes of digest, where `tokens` are the block's token
ids as little-endian 32-bit words and `parent` is the hash of the block before it, or for the first block
`blake2b(salt, person=b"meshlm.prefix")`. A router that knows tokens and salt can so count the blocks of a prompt that
a worker holds: the longest run of present hashes from the first.

Two probes from one hash: Kirsch and Mitzenmacher, "Less Hashing, Same Performance" (2006).
"""

from __future__ import annotations

PROBES = 4
SMALLEST_BITS = 1 << 10
LARGEST_BITS = 1 << 16  # 8 KiB a digest, at most 20 a second


def probes(digest_bits: int, count: int, prefix_hash: bytes) -> list[int]:
    """The bits of a filter of `digest_bits` bits that stand for `prefix_hash`."""
    a = int.from_bytes(prefix_hash[:8], "little")
    b = int.from_bytes(prefix_hash[8:], "little") | 1
    return [(a + j * b) % digest_bits for j in range(count)]


def contains(digest: bytes, prefix_hash: bytes) -> bool:
    """Whether `digest` holds `prefix_hash`: never wrong if not, and wrong in under 3% of cases if so."""
    bits = probes(8 * (len(digest) - 1), digest[0], prefix_hash)
    return all(digest[1 + (bit >> 3)] >> (bit & 7) & 1 for bit in bits)


class Digest:
    """A counting Bloom filter: the counts stay here, the bits travel."""

    def __init__(self, members: int) -> None:
        """Sized for `members` hashes at 8 bits each, within SMALLEST_BITS and LARGEST_BITS."""
        self._bits = min(max(1 << (8 * members - 1).bit_length(), SMALLEST_BITS), LARGEST_BITS)
        self._counts = [0] * self._bits
        self._filter = bytearray(self._bits // 8)
        self._told: bytes | None = None

    def add(self, prefix_hash: bytes) -> None:
        self._told = None
        for bit in probes(self._bits, PROBES, prefix_hash):
            self._counts[bit] += 1
            self._filter[bit >> 3] |= 1 << (bit & 7)

    def remove(self, prefix_hash: bytes) -> None:
        """Takes out a hash that was added before."""
        self._told = None
        for bit in probes(self._bits, PROBES, prefix_hash):
            self._counts[bit] -= 1
            if self._counts[bit] == 0:
                self._filter[bit >> 3] &= ~(1 << (bit & 7))

    def __bytes__(self) -> bytes:
        """The digest, in the format above. The same object until a hash is added or removed."""
        if self._told is None:
            self._told = bytes([PROBES]) + self._filter
        return self._told
