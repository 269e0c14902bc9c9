"""Stage 2's first half: how large a prompt is, before anything is spent on it; and, for its trace, how it looks."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from meshlm.chassis.parts import content_of
from meshlm.v1 import generation_pb2 as pb

# Both ends of a long text are looked at: what is appended to a prompt matters as much as how it begins.
_SAMPLE_BYTES = 8 * 1024
# English prose in byte-pair vocabularies has about 4 bytes a token; 3 errs towards reserving too much.
_BYTES_PER_TOKEN = 3
# Wrapping of a turn by a chat template, tokens.
_TOKENS_PER_MESSAGE = 8


@dataclass(frozen=True)
class Measure:
    size: int  # bytes of UTF-8, or 4 a token id
    tokens: int  # an estimate, exact for token ids; the worker's count replaces it


def text_of(source: pb.Input) -> str:
    """All text of an input; empty for token ids."""
    if source.WhichOneof("input") == "chat":
        return "\n".join(content_of(message) for message in source.chat.messages)
    return source.prompt


def measure(source: pb.Input) -> Measure:
    if source.WhichOneof("input") == "token_ids":
        count = len(source.token_ids.ids)
        return Measure(size=4 * count, tokens=count)
    data = text_of(source).encode()
    tokens = math.ceil(len(data) / _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE * (len(source.chat.messages) + 1)
    return Measure(size=len(data), tokens=tokens)


@dataclass(frozen=True)
class Texture:
    """Only told, in the trace: byte entropy alone punishes Chinese, base64 and UUIDs and misses attacks. What counts is
    surprise.py's."""

    entropy: float  # bits a byte, range [0, 8]
    compression: float  # compressed size over size (zlib, level 1)


def texture(source: pb.Input) -> Texture:
    """Of both ends of a text; of token ids nothing is known."""
    data = text_of(source).encode()
    sample = data if len(data) <= 2 * _SAMPLE_BYTES else data[:_SAMPLE_BYTES] + data[-_SAMPLE_BYTES:]
    if not sample:
        return Texture(entropy=0.0, compression=1.0)
    return Texture(byte_entropy(sample), len(zlib.compress(sample, 1)) / len(sample))


def byte_entropy(data: bytes) -> float:
    """Shannon entropy of the bytes' frequencies, bits a byte."""
    counts = np.bincount(np.frombuffer(data, np.uint8))
    shares = counts[counts > 0] / max(1, len(data))
    return abs(float((shares * np.log2(shares)).sum()))
