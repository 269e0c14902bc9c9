"""An answer as its reader saw it: the text, and when it came."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from meshlm.mesh.events import End, Event, Moderated, Start, Text


@dataclass
class Told:
    """Hears a stream's events, from the moment of the call on."""

    text: str = ""
    start: Start | None = None
    end: End | None = None
    tokens: int = 0
    first_token: float = 0.0  # seconds from the call to the first text
    total: float = 0.0  # seconds from the call to the last event
    cancelled: bool = False
    _begun: float = field(default_factory=time.perf_counter, repr=False)

    def hear(self, event: Event) -> str:
        """What this event adds to what the reader sees: text, or a word on it."""
        self.total = time.perf_counter() - self._begun
        match event:
            case Start():
                self.start = event
            case Text(text, usage=usage):
                self.first_token = self.first_token or self.total
                self.text += text
                self.tokens = usage.completion_tokens
                return text
            case Moderated(action="retract", char_start=start):
                self.text = self.text[:start]
                return f" [the guard took back the last of this: {', '.join(event.categories)}]"
            case Moderated(action="stop"):
                return f" [stopped by the guard: {', '.join(event.categories)}]"
            case End(usage):
                self.end, self.tokens = event, usage.completion_tokens
        return ""

    def cancel(self) -> None:
        """The reader left."""
        self.cancelled = True

    @property
    def request_id(self) -> str:
        """By which logs and `meshlm trace` know it."""
        return self.start.request_id if self.start else ""

    @property
    def reason(self) -> str:
        """Why the router answered from where it did."""
        return self.start.routing.reason if self.start else ""

    @property
    def from_cache(self) -> bool:
        """Whether nothing was computed for it."""
        return self.reason.startswith("cache_")

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        seconds = self.total - self.first_token
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else 0.0

    def summary(self) -> str:
        """One line of figures."""
        how = ", ".join(self.end.finish_reasons.values()) if self.end else "cancelled"
        # An answer from the cache comes at once: its rate is no one's speed.
        rate = f"{self.tokens_per_second:.1f} tokens/s, " if self.tokens > 1 and not self.from_cache else ""
        return (
            f"first token after {self.first_token * 1000:.0f} ms, {rate}{self.tokens} tokens in {self.total:.2f} s, "
            f"{how}, {self.reason}; request {self.request_id}"
        )
