"""How a long text is cut: ranges that overlap, so that no attack is only ever seen in halves."""

from __future__ import annotations

# Characters of a window; about 200 tokens of English.
WINDOW = 800
# Characters from one window's start to the next one's.
STRIDE = 400


def spans(length: int) -> list[tuple[int, int]]:
    """Ranges that cover a text; one where it is short, and the last as long as the others."""
    if length <= WINDOW:
        return [(0, length)]
    starts = [*range(0, length - WINDOW, STRIDE), length - WINDOW]
    return [(start, start + WINDOW) for start in starts]
