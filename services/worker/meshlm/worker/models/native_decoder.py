"""Runs a decoder natively on a CPU: a whole step in one parallel region, see `kernels/native/src/step.cpp`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from meshlm.kernels.native import structures as c
from meshlm.kernels.native.cache import Cache
from meshlm.kernels.native.library import Library, Pool
from meshlm.kernels.native.packed import PackedMatrix
from meshlm.worker.models.decoder import Decoder, DecoderLayer, Experts, Mlp, Projection

if TYPE_CHECKING:
    import torch

PHASES = ("embed", "norm", "qkv", "rope", "attend", "output", "gate_up", "down", "head", "draw")

_ACTIVATIONS = {"silu": c.SILU, "gelu_tanh": c.GELU_TANH}


class NativeDecoder:
    """A decoder's weights and working memory in the native library. One thread calls it."""

    def __init__(
        self,
        decoder: Decoder[PackedMatrix],
        cache: Cache,
        library: Library,
        pool: Pool,
        *,
        max_rows: int,
        max_outputs: int,
    ) -> None:
        """max_rows: of a step; max_outputs: of them, whose logits are wanted. Raises MemoryError."""
        self.config = decoder.config
        self.cache = cache
        self.pool = pool
        self.importance = cache.scores()  # of cached tokens; not touched, hence no memory, without a budget that asks
        self._kept: list[object] = [decoder]  # what the structures point to
        self._step = library.function("meshlm_decoder_step", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._free = library.function("meshlm_decoder_free", None, ctypes.c_void_p)
        self._phases = library.function("meshlm_decoder_phases", None, ctypes.c_void_p, ctypes.c_void_p)
        self.weight_bytes = _weight_bytes(decoder)
        spec = self._spec(decoder, max_rows, max_outputs)
        new = library.function("meshlm_decoder_new", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._handle = new(ctypes.addressof(spec), pool.handle)
        if not self._handle:
            raise MemoryError("no memory for the working space of a step")

    def step(self, step: c.Step) -> None:
        """Runs a step. Raises MemoryError; nothing of the step took effect then."""
        if self._step(self._handle, ctypes.addressof(step)):
            raise MemoryError("no memory for a step")

    def phase_seconds(self) -> dict[str, float]:
        """Where the time of all steps so far went, as the calling thread saw it."""
        seconds = np.zeros(len(PHASES))
        self._phases(self._handle, seconds.ctypes.data)
        return dict(zip(PHASES, seconds.tolist(), strict=True))

    def close(self) -> None:
        if self._handle:
            self._free(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    # Structures

    def _spec(self, decoder: Decoder[PackedMatrix], max_rows: int, max_outputs: int) -> c.DecoderSpec:
        config = decoder.config
        layers = (c.LayerSpec * len(decoder.layers))(*(self._layer(layer) for layer in decoder.layers))
        ropes = (c.RopeSpec * len(decoder.ropes))(
            *(c.RopeSpec(self._floats(rope.frequencies), len(rope.frequencies), rope.factor) for rope in decoder.ropes)
        )
        self._kept += [layers, ropes]
        return c.DecoderSpec(
            width=config.hidden_size,
            heads=config.heads,
            middle=config.intermediate_size,
            vocab=config.vocab_size,
            layers=len(layers),
            ropes=len(ropes),
            activation=_ACTIVATIONS[decoder.activation],
            max_rows=max_rows,
            max_outputs=max_outputs,
            eps=config.norm_eps,
            attention_scale=decoder.attention_scale,
            embedding_scale=decoder.embedding_scale,
            embedding=decoder.embedding.handle,
            head=decoder.head.handle,
            norm=self._floats(decoder.norm),
            layer=layers,
            rope=ropes,
            cache=self.cache.struct,
            importance=self.importance.ctypes.data,
        )

    def _layer(self, layer: DecoderLayer[PackedMatrix]) -> c.LayerSpec:
        if isinstance(layer.mlp, Experts):
            experts, router, active = layer.mlp.experts, layer.mlp.router, layer.mlp.active
        else:
            experts, router, active = (layer.mlp,), None, 1
        mlps = (c.Mlp * len(experts))(*(self._mlp(expert) for expert in experts))
        self._kept.append(mlps)
        return c.LayerSpec(
            attention_norm=self._floats(layer.attention_norm),
            attention_post_norm=self._floats(layer.attention_post_norm),
            mlp_norm=self._floats(layer.mlp_norm),
            mlp_post_norm=self._floats(layer.mlp_post_norm),
            query_norm=self._floats(layer.query_norm),
            key_norm=self._floats(layer.key_norm),
            query=self._projection(layer.query),
            key=self._projection(layer.key),
            value=self._projection(layer.value),
            output=self._projection(layer.output),
            mlps=mlps,
            router=self._floats(router),
            experts=len(experts),
            active=active,
            rope=layer.rope,
            window=layer.window or 0,
        )

    def _mlp(self, mlp: Mlp[PackedMatrix]) -> c.Mlp:
        return c.Mlp(self._projection(mlp.gate), self._projection(mlp.up), self._projection(mlp.down))

    def _projection(self, projection: Projection[PackedMatrix]) -> c.Projection:
        return c.Projection(projection.weight.handle, self._floats(projection.bias))

    def _floats(self, values: torch.Tensor | None) -> int | None:
        """The address of float32 values, kept alive with the decoder."""
        if values is None:
            return None
        array: npt.NDArray[np.float32] = np.ascontiguousarray(values, np.float32)
        self._kept.append(array)
        return array.ctypes.data


def _weight_bytes(decoder: Decoder[PackedMatrix]) -> int:
    """Of the matrices; a tied head counts once."""
    matrices = [decoder.embedding] if decoder.head is decoder.embedding else [decoder.embedding, decoder.head]
    for layer in decoder.layers:
        matrices += [part.weight for part in (layer.query, layer.key, layer.value, layer.output)]
        for mlp in layer.mlp.experts if isinstance(layer.mlp, Experts) else (layer.mlp,):
            matrices += [part.weight for part in (mlp.gate, mlp.up, mlp.down)]
    return sum(matrix.nbytes for matrix in matrices)
