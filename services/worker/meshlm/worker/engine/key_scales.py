"""What the channels of keys are divided by before 4 bits hold them: found by running the model once, when it is loaded.

A few channels of a model's keys are many times as large as the others, always the same ones (KIVI, arXiv:2402.02750).
With one scale a token and head they would leave the others nothing of 16 levels.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from dataclasses import replace

import numpy as np

from meshlm.kernels.native import structures as c
from meshlm.kernels.native.cache import Cache, CacheShape, Floats
from meshlm.kernels.native.library import Library, Pool
from meshlm.kernels.native.packed import PackedMatrix
from meshlm.worker.models.decoder import Decoder
from meshlm.worker.models.native_decoder import NativeDecoder

_TOKENS = 512
_PIECE = 16  # tokens whose keys lie together, `PIECE` in native/src/kv_cache.h
# Measured on SmolLM2 (docs/quantization.md): quantiles below 1 and exponents from 0.5 to 1 do about equally well.
_QUANTILE = 0.99
_EXPONENT = 0.75  # between equal channels (1) and equal scales (0)


def key_scales(decoder: Decoder[PackedMatrix], library: Library, pool: Pool, shape: CacheShape, context: int) -> Floats:
    """(layers, kv_heads, head_dim), for a cache of this shape.

    The tokens are random: which channels are large hardly depends on the text, and a model's file need not have a
    tokenizer for it. context: most tokens that the model reads.
    """
    count = min(_TOKENS, context)
    words = np.random.RandomState(0).randint(0, 1 << 32, count, np.uint32)  # as torch's generator draws them
    tokens = (words % decoder.config.vocab_size).tolist()
    blocks = -(-count // shape.block_size)
    cache = Cache(library, replace(shape, dtype="float32", blocks=blocks))
    _compute(NativeDecoder(decoder, cache, library, pool, max_rows=count, max_outputs=1), tokens, blocks)
    place = math.ceil(_QUANTILE * count) - 1
    magnitudes = np.partition(np.abs(_keys(cache, count)), place, axis=-1)[..., place]
    scales: Floats = np.maximum(magnitudes, 1e-6) ** np.float32(_EXPONENT)
    return np.ascontiguousarray(scales, np.float32)


def _compute(decoder: NativeDecoder, tokens: list[int], blocks: int) -> None:
    """Fills the decoder's cache with the tokens' keys and values."""
    words, table = array("i", tokens), array("i", range(blocks))
    span = c.StepSpan(count=len(tokens), table=table.buffer_info()[0])
    step = c.Step(rows=len(tokens), spans=1, tokens=words.buffer_info()[0], span=ctypes.addressof(span))
    decoder.step(step)
    decoder.close()


def _keys(cache: Cache, count: int) -> Floats:
    """The cached keys of the first `count` tokens: (layers, kv_heads, head_dim, count)."""
    shape = cache.shape
    pieces = shape.block_size // _PIECE
    blocks = cache.data.view(np.float32).reshape(shape.layers, shape.blocks, shape.kv_heads, pieces, -1)
    keys = blocks[..., : shape.head_dim * _PIECE].reshape(*blocks.shape[:4], shape.head_dim, _PIECE)
    # (layers, kv_heads, head_dim, blocks, pieces, PIECE): tokens run over blocks, pieces, and within a piece.
    tokens_last = keys.transpose(0, 2, 4, 1, 3, 5)
    found: Floats = tokens_last.reshape(*tokens_last.shape[:3], -1)[..., :count]
    return found
