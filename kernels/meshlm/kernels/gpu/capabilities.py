"""What differs between GPUs by compute capability: how they multiply, and how much shared memory a block may have.

Two families: from Hopper on the data center's tensor cores take tiles from shared memory (wgmma on 9.x, tcgen05 on 10.x
and 11.x), those of Ampere, Ada (8.x) and of Blackwell's desktops (12.x) from registers, which then have less room for
everything else.
"""

from __future__ import annotations

# Bytes of shared memory that a block can have, by compute capability (CUDA C++ programming guide, table 30).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
LATEST_MAJOR = 9  # what a CPU, which interprets, is taken for

_FROM_SHARED = (9, 10, 11)
_EXACT_FP8 = (10, 11)


def shared_limit(architecture: int) -> int:
    """Bytes of shared memory that a block can have; of one that is not known, the least that there is since Ampere."""
    return SHARED_LIMIT.get(architecture, min(SHARED_LIMIT.values()))


def multiplies_from_shared(major: int) -> bool:
    """Whether tensor cores take their tiles from shared memory."""
    return major in _FROM_SHARED


def sums_fp8_exactly(major: int) -> bool:
    """Whether products of fp8 are summed in float32. On Hopper (DeepSeek-V3, arXiv:2412.19437, 3.3.2) and Ada
    (SageAttention2, arXiv:2411.10958, 3.2) sums keep about 14 bits; of 12.x it is not known."""
    return major in _EXACT_FP8
