"""How much of the engine each tenant has had: virtual token counters (Sheng et al., "Fairness in Serving Large Language
Models", OSDI '24, arXiv:2401.00588).

A tenant's counter grows by what its sequences cost: INPUT_WEIGHT a prompt token that had to be computed (at the start
of the sequence; tokens found in the prefix cache are free), OUTPUT_WEIGHT a token drawn. What is computed again after a
preemption is the engine's doing and costs nothing. The tenant with the least counter starts next.

A tenant that comes back from idleness is lifted to the least counter of those that wait: time without requests is no
credit. Between two tenants that both always have something waiting, the counters so differ by no more than
max(INPUT_WEIGHT * longest prompt, OUTPUT_WEIGHT * tokens that fit into a batch), and what they get in any span of time
by no more than twice that (theorem 4.4 there).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set

INPUT_WEIGHT = 1
OUTPUT_WEIGHT = 2
FORGET_FROM = 1024  # tenants known, from which on those that left nothing behind are forgotten


class Shares:
    """The counters, by tenant."""

    def __init__(self) -> None:
        self._served: defaultdict[str, int] = defaultdict(int)
        self._level = 0  # the counter of the tenant that started last, as it was then

    def served(self, tenant: str) -> int:
        return self._served.get(tenant, 0)

    def join(self, tenant: str, waiting: Set[str]) -> None:
        """A tenant with nothing waiting sends a sequence, while the tenants `waiting` have some."""
        level = min(map(self.served, waiting), default=self._level)
        if len(self._served) >= FORGET_FROM:
            # Who has nothing waiting and no more than the level would be lifted to it on return.
            kept = {name: served for name, served in self._served.items() if served > level or name in waiting}
            self._served = defaultdict(int, kept)
        self._served[tenant] = max(self.served(tenant), level)

    def start(self, tenant: str, computed: int) -> None:
        """A sequence starts that has so many prompt tokens to compute."""
        self._level = self.served(tenant)
        self._served[tenant] = self._level + INPUT_WEIGHT * computed

    def draw(self, tenant: str) -> None:
        """A token was drawn."""
        self._served[tenant] += OUTPUT_WEIGHT
