"""The structures of `src/decoder.h` and `src/matrix.h`, field by field, for ctypes.

Pointers are plain addresses: whoever fills a structure keeps what they point to alive.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p

SILU, GELU_TANH = 0, 1
NO_TOKEN = -1  # what is drawn of a row that is no distribution: a logit is no number, or none is above -inf
KV_FLOAT32, KV_BFLOAT16, KV_BFLOAT16_PAIRS, KV_INT8, KV_INT4 = range(5)


class Matrix(ctypes.Structure):
    _fields_ = (
        ("format", c_int32),
        ("rows", c_int32),
        ("cols", c_int32),
        ("reserved", c_int32),
        ("data", c_void_p),
    )


class Projection(ctypes.Structure):
    _fields_ = (("weight", Matrix), ("bias", c_void_p))


class Mlp(ctypes.Structure):
    _fields_ = (("gate", Projection), ("up", Projection), ("down", Projection))


class LayerSpec(ctypes.Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("attention_post_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_post_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("query", Projection),
        ("key", Projection),
        ("value", Projection),
        ("output", Projection),
        ("mlps", ctypes.POINTER(Mlp)),
        ("router", c_void_p),
        ("experts", c_int32),
        ("active", c_int32),
        ("rope", c_int32),
        ("window", c_int32),
    )


class RopeSpec(ctypes.Structure):
    _fields_ = (("frequencies", c_void_p), ("half", c_int32), ("factor", c_float))


class KvCache(ctypes.Structure):
    _fields_ = (
        ("type", c_int32),
        ("layers", c_int32),
        ("blocks", c_int32),
        ("kv_heads", c_int32),
        ("block_size", c_int32),
        ("head_dim", c_int32),
        ("data", c_void_p),
        ("key_scale", c_void_p),
    )


class DecoderSpec(ctypes.Structure):
    _fields_ = (
        ("width", c_int32),
        ("heads", c_int32),
        ("middle", c_int32),
        ("vocab", c_int32),
        ("layers", c_int32),
        ("ropes", c_int32),
        ("activation", c_int32),
        ("max_rows", c_int32),
        ("max_outputs", c_int32),
        ("eps", c_float),
        ("attention_scale", c_float),
        ("embedding_scale", c_float),
        ("embedding", Matrix),
        ("head", Matrix),
        ("norm", c_void_p),
        ("layer", ctypes.POINTER(LayerSpec)),
        ("rope", ctypes.POINTER(RopeSpec)),
        ("cache", KvCache),
        ("importance", c_void_p),
    )


class Step(ctypes.Structure):
    _fields_ = (
        ("rows", c_int32),
        ("spans", c_int32),
        ("tokens", c_void_p),
        ("span", c_void_p),
        ("outputs", c_int32),
        ("scores", c_int32),
        ("pools", c_int32),
        ("reserved", c_int32),
        ("output_rows", c_void_p),
        ("logits", c_void_p),
        ("draw", c_void_p),
        ("drawn", c_void_p),
        ("score", c_void_p),
        ("pool", c_void_p),
    )


class StepSpan(ctypes.Structure):
    _fields_ = (
        ("row", c_int32),
        ("count", c_int32),
        ("start", c_int32),
        ("sinks", c_int32),
        ("position", c_int64),
        ("rebased", c_int64),
        ("observe", c_int32),
        ("reserved", c_int32),
        ("table", c_void_p),
    )


class PoolRows(ctypes.Structure):
    _fields_ = (("row", c_int32), ("count", c_int32), ("sum", c_void_p))


class Draw(ctypes.Structure):
    _fields_ = (
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("uniform", c_double),
    )
