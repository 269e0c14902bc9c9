"""How streams survive the loss of workers and connections (section `router.streams`), see docs/streams.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StreamsConfig:
    """How much is done to keep a stream alive."""

    # Attempts at another replica before the first token, as a share of requests. Range [0, 1].
    retry_share: float = 0.1
    # Such attempts a second that one router may always make, however few requests there are.
    retries_per_second: float = 10.0
    # Most times that one stream goes on at another worker after its first token; 0: it ends with its worker.
    resumes: int = 8
    # Seconds that such a stream waits for a worker to go on with, where none is ready.
    resume_wait_seconds: float = 5.0
    # Seconds without a message from a worker that says it is alive, after a stream's first token, after which the
    # stream is taken as lost there; above `worker.hang_seconds`.
    idle_seconds: float = 45.0
    # After this percentile of recent times to the first token, for prompts of about its length, a request is sent to a
    # second replica too, and the slower one is cancelled; it counts as a retry. 0: never. Range [0, 100).
    hedge_percentile: float = 0.0
    # Seconds for which a `resumable` stream that broke can be resumed by its request's id.
    resumable_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.retry_share <= 1 or self.retries_per_second < 0:
            raise ValueError("retry_share must be in [0, 1], and retries_per_second at least 0")
        if self.resumes < 0 or self.resume_wait_seconds < 0:
            raise ValueError("resumes and resume_wait_seconds must be at least 0")
        if self.idle_seconds <= 0 or self.resumable_seconds < 1:
            raise ValueError("idle_seconds must be above 0, and resumable_seconds at least 1")
        if not 0 <= self.hedge_percentile < 100:
            raise ValueError("hedge_percentile must be in [0, 100)")
