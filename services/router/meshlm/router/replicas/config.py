"""Configuration of the choice among replicas (section `router.replicas`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How replicas are compared, and when one is left out. docs/routing.md says how it works."""

    # Seconds for which a router that starts waits until every worker is ready, not serving; calls that come meanwhile
    # wait, too. Then it serves with those that are. 0: it serves at once.
    hear_seconds: float = 10.0
    # Seconds over which a replica that has just become ready gets up to its full share; 0: at once.
    slow_start_seconds: float = 15.0
    # Failures in a row after which a replica is ejected; 0: never for that.
    eject_failures: int = 5
    # Share of failures among a replica's latest requests (20 or more) from which it is ejected. Range (0, 1]; 1: never.
    eject_share: float = 0.5
    # How many times slower than its peers, by time to the first token or per token, ejects a replica; 0: never.
    eject_slowness: float = 5.0
    # Seconds for which a replica is ejected; doubled each time, up to 32 times.
    eject_seconds: float = 5.0
    # Largest share of a model's replicas that may be ejected at a time. Range [0, 1].
    most_ejected: float = 0.5
    # Routers that must have ejected a replica for all to leave it out, as they tell each other in the store. 1: any one
    # decides for all; 0: each decides for itself.
    eject_routers: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.eject_share <= 1 or not 0 <= self.most_ejected <= 1:
            raise ValueError("eject_share must be in (0, 1], and most_ejected in [0, 1]")
        counts = (self.hear_seconds, self.slow_start_seconds, self.eject_failures, self.eject_routers)
        if min(counts) < 0 or self.eject_seconds <= 0:
            raise ValueError(
                "hear_seconds, slow_start_seconds, eject_failures and eject_routers cannot be negative, and "
                "eject_seconds must be above 0"
            )
        if self.eject_slowness and self.eject_slowness <= 1:
            raise ValueError("eject_slowness must be above 1, or 0")
