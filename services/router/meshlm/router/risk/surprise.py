"""How surprising a text is where it is most surprising, and the risk in that.

A token (or byte) counts with its surprisal less the entropy of what could have stood there: text that nobody could have
foretold, such as base64 or a name, surprises no more than was to be expected, and an optimised suffix does. A text's
surprise is the largest mean over a window, so that an attack does not thin out in a long prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meshlm.router.risk.config import RampConfig
from meshlm.router.risk.ngrams import ByteModel, load

# What was let through, and a surprising prompt, cannot weigh more than a risk of so much.
UNPROVEN = 0.5
# Tokens of a window, and how many at most say nothing.
WINDOW = 16
FEW = 8
# English has about four bytes a token.
BYTES = 4
# Ramps by the revision of what read the text (docs/risk.md says how they were found).
NGRAM = "ngram"
RAMPS: Mapping[str, RampConfig] = {NGRAM: RampConfig(calm=4.75, alarm=5.75)}
MODEL_RAMP = RampConfig(calm=4.0, alarm=6.0)

# Digests, ids and encoded data: opaque to a model of bytes. Mostly small letters may be words.
_OPAQUE = re.compile(rb"[A-Za-z0-9+/=_-]{20,}")
_SMALL = re.compile(rb"[a-z]")


@dataclass(frozen=True)
class Surprise:
    """A text's, and who says so."""

    nats: float  # a token's, or a byte's for the n-gram estimate
    source: str  # the model's revision, or the n-gram table's version

    @property
    def by_model(self) -> bool:
        """Whether a model read it."""
        return not self.source.startswith(f"{NGRAM}-")


def peak(surprisal: Sequence[float] | NDArray[np.float32], entropy: Sequence[float] | NDArray[np.float32], window: int
         ) -> float:  # fmt: skip
    """The largest mean of (surprisal - entropy) over `window` neighbours, or over all where there are fewer."""
    excess = np.asarray(surprisal, np.float64) - np.asarray(entropy, np.float64)
    sums = np.concatenate(([0.0], np.cumsum(excess)))
    width = min(window, len(excess))
    return float((sums[width:] - sums[:-width]).max() / width)


def ends_of(text: str, tokens: int) -> list[bytes]:
    """A text's beginning and end of about `tokens` each; the whole where that is no more than both."""
    data, size = text.encode(), tokens * BYTES
    return [data] if len(data) <= 2 * size else [data[:size], data[-size:]]


class Estimator:
    """Surprise without a model: by the n-gram table that the router ships."""

    def __init__(self) -> None:
        self._model = ByteModel(load())

    def surprise(self, text: str, tokens: int) -> Surprise | None:
        """Of its beginning and end of about `tokens` each; None for what is too short."""
        parts = [part for part in ends_of(text, tokens) if len(part) > FEW * BYTES]
        if not parts:
            return None
        return Surprise(max(self._peak(part) for part in parts), self._model.version)

    def _peak(self, data: bytes) -> float:
        surprisal, entropy = self._model.read(data)
        for run in _OPAQUE.finditer(data):
            if len(_SMALL.findall(run[0])) < 0.8 * len(run[0]):
                surprisal[run.start() : run.end()] = entropy[run.start() : run.end()]
        return peak(surprisal, entropy, WINDOW * BYTES)


def risk_of(surprise: Surprise | None, ramps: Mapping[str, RampConfig]) -> float:
    """Never more than UNPROVEN: a text that is merely odd can delay its caller, and no more."""
    if surprise is None:
        return 0.0
    name = surprise.source if surprise.by_model else NGRAM
    ramp = ramps.get(name) or RAMPS.get(name) or MODEL_RAMP
    return UNPROVEN * min(1.0, max(0.0, (surprise.nats - ramp.calm) / (ramp.alarm - ramp.calm)))
