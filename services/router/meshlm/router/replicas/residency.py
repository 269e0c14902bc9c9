"""Where a caller's requests may be computed and kept: a hard filter, before anything is compared.

A region allows itself and what lies in it: `eu` allows `eu` and `eu-west-1`, not `europe`.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshlm.chassis.errors import MeshError, Reason
from meshlm.router.config import KeyConfig, RouterConfig


@dataclass(frozen=True)
class Regions:
    """Where a request may go. Each of `holders` (its key, its tenant) allows some regions; empty: all."""

    holders: tuple[tuple[str, ...], ...] = ()

    def allow(self, region: str) -> bool:
        return all(any(_lies_in(region, allowed) for allowed in holder) for holder in self.holders)

    def __str__(self) -> str:
        return " and ".join(",".join(holder) for holder in self.holders)


ANYWHERE = Regions()


class Residency:
    """The configuration's answer for a key, and for the places that this router uses."""

    def __init__(self, config: RouterConfig) -> None:
        self._tenants = config.tenants
        self._own = config.region
        self._guard = config.guard_region or config.region if config.guard else ""
        self._cache = config.cache_region or config.region if config.cache else ""

    def regions(self, key: KeyConfig) -> Regions:
        tenant = self._tenants.get(key.tenant)
        holders = (key.regions, tenant.regions if tenant is not None else ())
        return Regions(tuple(holder for holder in holders if holder))

    def check(self, regions: Regions) -> None:
        """Raises MeshError REGION_NOT_ALLOWED where this router or its guard lies elsewhere: its state, its log and its
        traces lie where it does."""
        for place, region in (("router", self._own), ("guard", self._guard)):
            if region and not regions.allow(region):
                raise MeshError(
                    Reason.REGION_NOT_ALLOWED,
                    f"this {place} lies outside the regions of the caller",
                    metadata={"place": place, "region": region, "regions": str(regions)},
                )

    def cache_allowed(self, regions: Regions) -> bool:
        """Whether answers may be looked up and kept in the cache; one elsewhere is passed by."""
        return not self._cache or regions.allow(self._cache)


def _lies_in(region: str, allowed: str) -> bool:
    return region == allowed or region.startswith(f"{allowed}-")
