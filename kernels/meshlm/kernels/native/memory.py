"""Memory for packed weights: aligned, and in huge pages where there is much of it.

Reading weights at the memory's speed touches a new 4 KB page every few hundred nanoseconds; with 2 MB pages the walks
through the page table are few.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

ALIGNMENT = 64  # bytes: a cache line, and what AVX-512 loads
HUGE_PAGE = 2 << 20
_HUGE_FROM = 4 << 20  # smaller mappings would waste too much of a huge page


class Arena:
    """Hands out pieces of large mappings, one behind the other, so that small matrices share huge pages.

    A piece keeps its mapping alive; a mapping is given back when its last piece is gone.
    """

    def __init__(self, chunk_bytes: int = 32 << 20) -> None:
        self._chunk_bytes = chunk_bytes
        self._mapping: mmap.mmap | None = None
        self._used = 0

    def allocate(self, nbytes: int) -> ctypes.Array[ctypes.c_uint8]:
        """`nbytes` zero bytes, aligned to ALIGNMENT. Raises OSError or MemoryError where there is no memory."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if self._mapping is None or start + nbytes > len(self._mapping):
            self._mapping, start = _map(max(nbytes, self._chunk_bytes))
        self._used = start + nbytes
        return (ctypes.c_uint8 * nbytes).from_buffer(self._mapping, start)


def _map(nbytes: int) -> tuple[mmap.mmap, int]:
    """A new mapping, and where its `nbytes` usable bytes begin. Pages that are never written take no memory."""
    huge = nbytes >= _HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE")
    # Private: shared memory, the default, gets no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapping = mmap.mmap(-1, nbytes + (HUGE_PAGE if huge else 0), flags=flags)
    if not huge:
        return mapping, 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    with contextlib.suppress(OSError):  # a kernel without huge pages serves small ones
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, -address % HUGE_PAGE
