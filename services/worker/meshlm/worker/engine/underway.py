"""Which blocks of the prefix cache are being computed right now, so that nobody computes them a second time.

A waiting sequence whose next missing block is claimed by a running one waits for it, and those behind it pass. It holds
nothing meanwhile, and a running prefill never waits for a waiting sequence, so there is no circle. It is not put off
for ever: the claims of a sequence end with its prefill, however that ends, and a sequence is put off a second time only
where more of its prefix is known than the last time, which is at most once for each of its blocks. Where the claimer
ranks behind it, no more others pass than the claimer has chunks left: nobody starts in a step in which it got none.
"""

from __future__ import annotations

from meshlm.worker.engine.sequence import Sequence


class Underway:
    """Claims on prefix hashes (`blocks.py`), each by the first running sequence that came to compute it."""

    def __init__(self) -> None:
        self._claimed: dict[bytes, Sequence] = {}
        self._claims: dict[str, list[bytes]] = {}  # by id of the claimer
        self._awaited: dict[str, tuple[int, bytes]] = {}  # by id of the waiter: blocks it had, hash it waits for

    def __bool__(self) -> bool:
        return bool(self._claimed)

    def claim(self, sequence: Sequence, hashes: list[bytes]) -> None:
        """`sequence` starts, and will compute blocks with these hashes."""
        self._awaited.pop(sequence.id, None)
        fresh = [prefix_hash for prefix_hash in hashes if prefix_hash not in self._claimed]
        if fresh:
            self._claimed.update(dict.fromkeys(fresh, sequence))
            self._claims[sequence.id] = fresh

    def computed(self, prefix_hash: bytes) -> None:
        """The block with this hash is findable."""
        self._claimed.pop(prefix_hash, None)

    def drop(self, sequence: Sequence) -> None:
        """`sequence` computes no more of a prompt, or waits no longer. Nothing where it never did."""
        self._awaited.pop(sequence.id, None)
        for prefix_hash in self._claims.pop(sequence.id, ()):
            if self._claimed.get(prefix_hash) is sequence:
                del self._claimed[prefix_hash]

    def still_awaited(self, sequence: Sequence) -> bool:
        """Whether what `sequence` was put off for last is still being computed."""
        awaited = self._awaited.get(sequence.id)
        return awaited is not None and awaited[1] in self._claimed

    def put_off(self, sequence: Sequence, hashes: list[bytes], known: int) -> bool:
        """Whether to wait, for a sequence whose blocks have `hashes`, of which the first `known` are cached.

        It waits until the last block of the claimed run behind them is computed.
        """
        before = self._awaited.get(sequence.id, (-1, b""))[0]
        end = known
        while end < len(hashes) and hashes[end] in self._claimed:
            end += 1
        if end == known or known <= before:
            return False
        self._awaited[sequence.id] = known, hashes[end - 1]
        return True
