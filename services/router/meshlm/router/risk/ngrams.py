"""A language model of bytes, small enough to ship: how likely each byte is after the three before it.

Back-off n-grams as in ARPA files: a gram that is known has its probability, one that is not has that of its shorter
one, times the context's back-off. Tables are hashed: a slot holds a mark of its gram, 16 bits of the
hash, against mix-ups. A gram counts only where its context is known too. `benchmarks/entropy_data/ngram_table.py`
makes the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
FILE = "ngrams.npz"
ORDER = 4
# A value of a probability or an entropy is a code from 1 to 255, in steps of so many nats; 0 is an empty slot.
NATS = 0.05
ENTROPY_NATS = 0.025
# Codes of back-offs stand for -2 nats (a factor of 7) and up.
BACKOFF_FROM = -2.0

_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_ARRAYS = ("unigram", "grams", "nats", "contexts", "backoffs", "entropies")
Codes = NDArray[np.uint8]
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Table:
    """What the file holds."""

    unigram: Codes  # [256]: -log p of a byte
    grams: NDArray[np.uint16]  # [a power of two]: marks of grams; 0: empty
    nats: Codes  # [as grams]: -log p of the gram's last byte
    contexts: NDArray[np.uint16]  # [a power of two]: marks of contexts; 0: empty
    backoffs: Codes  # [as contexts]
    entropies: Codes  # [as contexts]: of the byte that follows
    card: dict[str, Any]

    @property
    def version(self) -> str:
        """e.g. `ngram-1-3f2a91bc`."""
        digest = hashlib.sha256(json.dumps(self.card, sort_keys=True).encode())
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return f"ngram-{FORMAT}-{digest.hexdigest()[:8]}"


def load() -> Table:
    """The table that the router ships."""
    with (
        resources.files("meshlm.router.risk").joinpath(FILE).open("rb") as file,
        np.load(file, allow_pickle=False) as kept,
    ):
        card = json.loads(kept["card"].tobytes())
        if card["format"] != FORMAT:
            raise ValueError(f"{FILE} has format {card['format']}, not {FORMAT}")
        return Table(**{name: kept[name] for name in _ARRAYS}, card=card)


def places(words: Words, length: int, slots: int) -> tuple[NDArray[np.intp], Words]:
    """For grams of `length` bytes, each packed into a word: their slots and their marks."""
    hashed = (words + np.uint64(length << 40)) * _SPREAD
    hashed ^= hashed >> np.uint64(32)
    hashed *= _SPREAD
    bits = np.uint64(slots.bit_length() - 1)
    marks = np.maximum(hashed & np.uint64(0xFFFF), np.uint64(1))
    return (hashed >> (np.uint64(64) - bits)).astype(np.intp), marks


class ByteModel:
    """Reads texts."""

    def __init__(self, table: Table) -> None:
        self.version = table.version
        self._unigram = table.unigram * np.float32(NATS)
        self._grams = table.grams
        self._nats = table.nats * np.float32(NATS)
        self._contexts = table.contexts
        self._backoffs = table.backoffs * np.float32(NATS) + np.float32(BACKOFF_FROM)
        self._entropies = table.entropies * np.float32(ENTROPY_NATS)
        unigram = np.exp(-self._unigram.astype(np.float64))
        unigram /= unigram.sum()
        self._alone = np.float32(-(unigram * np.log(unigram)).sum())

    def read(self, data: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of each byte: its surprisal, and the entropy of what could have stood there; nats."""
        letters = np.frombuffer(data, np.uint8)
        surprisal = self._unigram[letters]
        entropy = np.full(len(letters), self._alone, np.float32)
        wide = letters.astype(np.uint64)
        context = wide
        for length in range(2, min(ORDER, len(letters)) + 1):
            context = context[:-1]  # the last one has no byte after it
            grams = (context << np.uint64(8)) | wide[length - 1 :]
            known, nats = self._gram(grams, length)
            met, backoff, uncertain = self._context(context, length - 1)
            shorter = surprisal[length - 1 :]
            surprisal[length - 1 :] = np.where(known & met, nats, shorter + np.where(met, backoff, np.float32(0)))
            entropy[length - 1 :] = np.where(met, uncertain, entropy[length - 1 :])
            context = grams
        return surprisal, entropy

    def _gram(self, words: Words, length: int) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        slots, marks = places(words, length, len(self._grams))
        return self._grams[slots] == marks, self._nats[slots]

    def _context(self, words: Words, length: int) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        slots, marks = places(words, length, len(self._contexts))
        return self._contexts[slots] == marks, self._backoffs[slots], self._entropies[slots]
