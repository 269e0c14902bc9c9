"""Traffic splits without state: who gets which arm is a hash, so every router says the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

from meshlm.router.routing.config import TargetConfig


def point(*parts: str) -> float:
    """A number that depends on the parts alone, uniform in (0, 1)."""
    digest = blake2b(digest_size=8)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)  # with its length, so that no two lists read alike
    # 53 bits: all that a float holds, so that neither 0 nor 1 can come out.
    return ((int.from_bytes(digest.digest(), "big") >> 11) + 0.5) / 2**53


def arm_of(route: str, subject: str, targets: Sequence[TargetConfig]) -> TargetConfig:
    """The arm that `subject` (a session, a key) stays on, with a probability in proportion to its weight.

    Rendezvous hashing (Thaler and Ravishankar, 1998), weighted: of exponential draws with rates w_i the least is arm
    i's with probability w_i / sum(w). Where weights change only as many subjects move as must, and where an arm goes,
    only its own. At least one weight must be above 0.
    """
    standing = [target for target in targets if target.weight > 0]
    return min(standing, key=lambda target: -math.log(point(route, target.name, subject)) / target.weight)
