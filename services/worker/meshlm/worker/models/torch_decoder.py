"""Runs a decoder in torch: the reference, the way to run on CUDA, and on a CPU without the native engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from meshlm.kernels.gelu_mul import gelu_mul
from meshlm.kernels.kv_cache import store_kv
from meshlm.kernels.linear import linear
from meshlm.kernels.paged_attention import paged_attention
from meshlm.kernels.prefill_attention import prefill_attention
from meshlm.kernels.rms_norm import rms_norm
from meshlm.kernels.rope import rope, rope_turns
from meshlm.kernels.silu_mul import silu_mul
from meshlm.worker.models.batch import Batch
from meshlm.worker.models.decoder import Decoder, DecoderLayer, Experts, Projection

_ACTIVATIONS = {"silu": silu_mul, "gelu_tanh": gelu_mul}


@dataclass(frozen=True, slots=True)
class _FusedMlp:
    gate_up: Projection[torch.Tensor]
    down: Projection[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _FusedLayer:
    """`parts` are read for what is not a product: norms, rope, window, router."""

    parts: DecoderLayer[torch.Tensor]
    qkv: Projection[torch.Tensor]
    output: Projection[torch.Tensor]
    mlps: tuple[_FusedMlp, ...]  # one, or the experts

    @property
    def nbytes(self) -> int:
        return sum(map(_nbytes, (self.qkv, self.output, *(p for mlp in self.mlps for p in (mlp.gate_up, mlp.down)))))


class TorchDecoder:
    """Weights and the forward pass. Stateless: keys and values live in the cache that the caller passes.

    Matrices are on one device and of one dtype, which is the dtype of the hidden states too.
    """

    def __init__(self, decoder: Decoder[torch.Tensor]) -> None:
        """Takes the decoder over: its matrices become views of larger ones, so that no weight is held twice."""
        self.config = decoder.config
        self._decoder = decoder
        self._layers = tuple(_fuse_layer(layer) for layer in decoder.layers)
        self._frequencies = [turn.frequencies.to(decoder.embedding.device) for turn in decoder.ropes]
        tables = decoder.embedding.nbytes + (0 if decoder.head is decoder.embedding else decoder.head.nbytes)
        self.weight_bytes = tables + sum(layer.nbytes for layer in self._layers)

    @property
    def windows(self) -> frozenset[int]:
        """The different windows of its layers: a batch must have a decode plan for each."""
        return frozenset(layer.window for layer in self._decoder.layers if layer.window is not None)

    def forward(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """Store the batch's keys and values. Returns the logits of its `rows`: (rows, vocab_size) float32.

        cache: (layers, 2, kv_heads, blocks, block_size, head_dim).
        """
        return self.logits(self.residual(batch, cache).index_select(0, batch.rows))

    def normed(self, residual: torch.Tensor) -> torch.Tensor:
        """The final hidden states, which the head reads: (rows, width)."""
        return rms_norm(residual, self._decoder.norm, self.config.norm_eps)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """residual: (rows, width), not yet normalized. Returns (rows, vocab_size) float32."""
        return linear(self.normed(residual), self._decoder.head).float()

    def residual(self, batch: Batch, cache: torch.Tensor) -> torch.Tensor:
        """The residual stream behind the last layer: (tokens, width)."""
        decoder = self._decoder
        residual = functional.embedding(batch.tokens, decoder.embedding)
        if decoder.embedding_scale != 1.0:
            residual.mul_(decoder.embedding_scale)
        turns = [
            rope_turns(frequencies, batch.positions, residual.dtype, turn.factor)
            for frequencies, turn in zip(self._frequencies, decoder.ropes, strict=True)
        ]
        for layer, layer_cache in zip(self._layers, cache, strict=True):
            parts = layer.parts
            normed = rms_norm(residual, parts.attention_norm, self.config.norm_eps)
            attended = self._attend(layer, normed, turns[parts.rope], batch, layer_cache)
            self._add(residual, _project(attended, layer.output), parts.attention_post_norm)
            normed = rms_norm(residual, parts.mlp_norm, self.config.norm_eps)
            self._add(residual, self._mlp(layer, normed), parts.mlp_post_norm)
        return residual

    def _add(self, residual: torch.Tensor, out: torch.Tensor, post_norm: torch.Tensor | None) -> None:
        residual.add_(out if post_norm is None else rms_norm(out, post_norm, self.config.norm_eps))

    def _attend(
        self,
        layer: _FusedLayer,
        normed: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """Project, rotate, store, attend: (tokens, width) to (tokens, query_size). cache: one layer's."""
        config, parts, scale = self.config, layer.parts, self._decoder.attention_scale
        heads, kv_heads = config.heads, config.kv_heads
        split = _project(normed, layer.qkv).view(-1, heads + 2 * kv_heads, config.head_dim)
        if parts.query_norm is not None:
            split[:, :heads] = rms_norm(split[:, :heads], parts.query_norm, config.norm_eps)
        if parts.key_norm is not None:
            keys = split[:, heads : heads + kv_heads]
            split[:, heads : heads + kv_heads] = rms_norm(keys, parts.key_norm, config.norm_eps)
        rope(split[:, : heads + kv_heads, : turns[0].shape[-1]], *turns)
        store_kv(cache, batch.slots, split[:, heads:])
        out: list[torch.Tensor] = []
        groups = batch.decode if parts.window is None else batch.windowed[parts.window]
        if groups:
            decoding = sum(group.rows for group in groups)
            out.append(paged_attention(split[:decoding, :heads], cache, groups, scale))
        for span in batch.prefill:
            rows = split[span.row : span.row + span.count, :heads]
            out.append(prefill_attention(rows, cache, span.blocks, span.start, scale, parts.window))
        joined = out[0] if len(out) == 1 else torch.cat(out)
        return joined.reshape(-1, config.query_size)

    def _mlp(self, layer: _FusedLayer, normed: torch.Tensor) -> torch.Tensor:
        mlp = layer.parts.mlp
        if isinstance(mlp, Experts):
            return self._mixture(normed, mlp, layer.mlps)
        return self._gated(normed, layer.mlps[0])

    def _gated(self, x: torch.Tensor, mlp: _FusedMlp) -> torch.Tensor:
        return _project(_ACTIVATIONS[self._decoder.activation](_project(x, mlp.gate_up)), mlp.down)

    def _mixture(self, x: torch.Tensor, mixture: Experts[torch.Tensor], mlps: Sequence[_FusedMlp]) -> torch.Tensor:
        """Each expert over the rows that chose it, weighted by a softmax over the logits of the chosen."""
        top, chosen = torch.topk(linear(x.float(), mixture.router), mixture.active, dim=-1)
        shares = torch.softmax(top, -1).to(x.dtype)
        out = torch.zeros_like(x)
        for number, mlp in enumerate(mlps):
            rows, place = torch.where(chosen == number)
            if len(rows):
                out.index_add_(0, rows, self._gated(x[rows], mlp) * shares[rows, place].unsqueeze(1))
        return out


def _project(x: torch.Tensor, projection: Projection[torch.Tensor]) -> torch.Tensor:
    return linear(x, projection.weight, projection.bias)


def _nbytes(projection: Projection[torch.Tensor]) -> int:
    return projection.weight.nbytes + (0 if projection.bias is None else projection.bias.nbytes)


def _fuse_layer(layer: DecoderLayer[torch.Tensor]) -> _FusedLayer:
    mlps = layer.mlp.experts if isinstance(layer.mlp, Experts) else (layer.mlp,)
    return _FusedLayer(
        parts=layer,
        qkv=_fuse(layer.query, layer.key, layer.value),
        output=_fuse(layer.output),
        mlps=tuple(_FusedMlp(_fuse(mlp.gate, mlp.up), _fuse(mlp.down)) for mlp in mlps),
    )


def _fuse(*parts: Projection[torch.Tensor]) -> Projection[torch.Tensor]:
    """Projections of one input as one, of whose weight theirs become views; biases get the weight's dtype."""
    weight = parts[0].weight
    if len(parts) > 1:
        weight = torch.cat([part.weight for part in parts])
        for part, rows in zip(parts, torch.split(weight, [len(part.weight) for part in parts]), strict=True):
            part.weight.data = rows
    biases = [part.bias for part in parts if part.bias is not None]
    return Projection(weight, torch.cat(biases).to(weight.dtype) if biases else None)
