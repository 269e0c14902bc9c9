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


def places(words: Words, length: int, slots: int) -> tuple[NDArray[np.intp], NDArray[np.uint16]]:
    """For grams of `length` bytes, each packed into a word: their slots and their marks."""
    hashed = _hashes(words, length)
    return _slots(hashed, slots), _marks(hashed)


def _hashes(words: Words, length: int) -> Words:
    hashed = (words + np.uint64(length << 40)) * _SPREAD
    hashed ^= hashed >> np.uint64(32)
    hashed *= _SPREAD
    return hashed


def _slots(hashed: Words, slots: int) -> NDArray[np.intp]:
    return (hashed >> np.uint64(64 - (slots.bit_length() - 1))).astype(np.intp)


def _marks(hashed: Words) -> NDArray[np.uint16]:
    return np.maximum(hashed.astype(np.uint16), np.uint16(1))


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
        self._read_pairs()

    def _read_pairs(self) -> None:
        """All that one and two bytes say, once: a prompt of some hundred bytes costs a router numpy's calls, and not
        its bytes."""
        letters = np.arange(256, dtype=np.uint64)
        met, backoff, uncertain = self._context(_hashes(letters, 1))
        self._after_one = np.where(met, uncertain, self._alone)  # [256]: entropy behind this byte
        pairs = np.arange(1 << 16, dtype=np.uint64)
        first, last = pairs >> np.uint64(8), pairs & np.uint64(0xFF)
        hashed = _hashes(pairs, 2)
        known, nats = self._gram(hashed)
        # [65,536], by both bytes: of the second, its surprisal; of what follows both, what else there is to know.
        weaker = self._unigram[last] + np.where(met, backoff, np.float32(0))[first]
        self._pairs = np.where(known & met[first], nats, weaker)
        self._pair_met, backoff, uncertain = self._context(hashed)
        self._pair_backoff = np.where(self._pair_met, backoff, np.float32(0))
        self._after_two = np.where(self._pair_met, uncertain, self._after_one[last])

    def read(self, data: bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of each byte: its surprisal, and the entropy of what could have stood there; nats."""
        letters = np.frombuffer(data, np.uint8)
        surprisal = self._unigram.take(letters)
        entropy = np.full(len(letters), self._alone, np.float32)
        if len(letters) < 2:
            return surprisal, entropy
        wide = letters.astype(np.uint64)
        pairs = (wide[:-1] << np.uint64(8)) | wide[1:]
        surprisal[1:] = self._pairs.take(pairs)
        entropy[1] = self._after_one[letters[0]]
        context = pairs[:-1]  # the last one has no byte after it
        entropy[2:] = self._after_two.take(context)
        met, backoff = self._pair_met.take(context), self._pair_backoff.take(context)
        for length in range(3, min(ORDER, len(letters)) + 1):
            grams = (context << np.uint64(8)) | wide[length - 1 :]
            hashed = _hashes(grams, length)
            known, nats = self._gram(hashed)
            surprisal[length - 1 :] = np.where(known & met, nats, surprisal[length - 1 :] + backoff)
            if length < ORDER:
                met, backoff, uncertain = self._context(hashed[:-1])
                backoff = np.where(met, backoff, np.float32(0))
                entropy[length:] = np.where(met, uncertain, entropy[length:])
                context = grams[:-1]
        return surprisal, entropy

    def _gram(self, hashed: Words) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        slots = _slots(hashed, len(self._grams))
        return self._grams.take(slots) == _marks(hashed), self._nats.take(slots)

    def _context(self, hashed: Words) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        slots = _slots(hashed, len(self._contexts))
        return self._contexts.take(slots) == _marks(hashed), self._backoffs.take(slots), self._entropies.take(slots)
