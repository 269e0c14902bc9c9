"""Runs a decoder on a GPU with Triton kernels. Every launch follows from the shapes of the batch alone, so that a step
can be captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from meshlm.kernels.gpu.embedding import embedding
from meshlm.kernels.gpu.gated_activation import gelu_mul, silu_mul
from meshlm.kernels.gpu.kv_cache import KvLayer
from meshlm.kernels.gpu.matrix import Matrix, QuantizedMatrix
from meshlm.kernels.gpu.moe import Experts as StackedExperts
from meshlm.kernels.gpu.moe import mixture, stack_experts
from meshlm.kernels.gpu.paged_attention import paged_attention
from meshlm.kernels.gpu.prefill_attention import prefill_attention
from meshlm.kernels.gpu.quant_matmul import quant_matmul
from meshlm.kernels.gpu.rms_norm import rms_norm
from meshlm.kernels.gpu.rope_store import rope_store, turns_table
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.decoder import Decoder, DecoderLayer, Experts, Mlp, Projection

_ACTIVATIONS = {"silu": silu_mul, "gelu_tanh": gelu_mul}


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """`Weights[Matrix]` on `device`, each matrix as `choose` (name, rows, cols) gives it there."""

    checkpoint: Checkpoint
    device: torch.device
    choose: Callable[[str, int, int], Matrix]

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        return self.choose(name, rows, cols)

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        return self.checkpoint.tensor(name, *shape).to(self.device, torch.float32, copy=True)

    def has(self, name: str) -> bool:
        return name in self.checkpoint.names


@dataclass(frozen=True, slots=True)
class GpuBatch:
    """A flat batch on the device: first `decodes` rows, one of each decoding sequence, then the rows of prefill chunks.

    tokens, positions, slots: (rows,) int32; a slot below 0 stores nothing.
    tables: (sequences, most_blocks) int32, decoding ones first; lengths: (sequences,) int32, tokens of each in the
    cache once the batch is stored, 0 for a row that only pads.
    starts: (prefills + 1,) int32, where the rows of each chunk begin, counted from row `decodes`.
    most_queries: at least the rows of the longest chunk; 0 where there is none.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    decodes: int
    most_queries: int


@dataclass(frozen=True, slots=True)
class _Fused:
    """Projections of one input: as one matrix where their formats allow, else one after the other into one output."""

    parts: tuple[Projection[Matrix], ...]
    rows: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.parts) == 1:
            return _project(x, self.parts[0])
        out = x.new_empty(x.shape[0], self.rows)
        start = 0
        for part in self.parts:
            end = start + _rows(part.weight)
            out[:, start:end] = _project(x, part)
            start = end
        return out

    @property
    def nbytes(self) -> int:
        return sum(part.weight.nbytes + (0 if part.bias is None else part.bias.nbytes) for part in self.parts)


@dataclass(frozen=True, slots=True)
class _FusedMlp:
    gate_up: _Fused
    down: _Fused

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes


@dataclass(frozen=True, slots=True)
class _FusedLayer:
    """`parts` are read for what is no product: norms, rope, window."""

    parts: DecoderLayer[Matrix]
    qkv: _Fused
    output: _Fused
    mlp: _FusedMlp | StackedExperts

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.output.nbytes + self.mlp.nbytes


class GpuDecoder:
    """Weights and the forward pass. Stateless: keys and values live in the cache that the caller passes."""

    def __init__(self, decoder: Decoder[Matrix], dtype: torch.dtype, device: torch.device) -> None:
        """Takes the decoder over. dtype: of hidden states."""
        self.config = decoder.config
        self.device = device
        self.dtype = dtype
        self._decoder = decoder
        self._layers = tuple(_fuse_layer(layer, dtype) for layer in decoder.layers)
        positions = self.config.max_context
        self._turns = [turns_table(rope.frequencies.to(device), positions, rope.factor) for rope in decoder.ropes]
        tables = decoder.embedding.nbytes + (0 if decoder.head is decoder.embedding else decoder.head.nbytes)
        self.weight_bytes = tables + sum(layer.nbytes for layer in self._layers)

    def residual(self, batch: GpuBatch, cache: Sequence[KvLayer]) -> torch.Tensor:
        """Stores the batch's keys and values. Returns the residual stream behind the last layer: (rows, width)."""
        decoder, eps = self._decoder, self.config.norm_eps
        residual = embedding(batch.tokens, decoder.embedding, scale=decoder.embedding_scale, dtype=self.dtype)
        out: torch.Tensor | None = None  # what the last half of a layer put out, not yet added
        for layer, kv in zip(self._layers, cache, strict=True):
            parts = layer.parts
            normed = self._normed(residual, out, parts.attention_norm)
            out = self._post(layer.output(self._attend(layer, normed, batch, kv)), parts.attention_post_norm)
            normed = rms_norm(out, parts.mlp_norm, eps, residual=residual)
            out = self._post(self._mlp(layer, normed), parts.mlp_post_norm)
        return residual if out is None else residual.add_(out)

    def normed(self, residual: torch.Tensor) -> torch.Tensor:
        """The final hidden states, which the head reads: (rows, width)."""
        return rms_norm(residual, self._decoder.norm, self.config.norm_eps)

    def logits(self, residual: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """residual: (rows, width), not yet normalized. Returns `out`, or a new tensor: (rows, vocab_size) float32."""
        logits = _project(self.normed(residual), Projection(self._decoder.head))
        return logits.float() if out is None else out.copy_(logits)

    def _normed(self, residual: torch.Tensor, out: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        if out is None:
            return rms_norm(residual, weight, self.config.norm_eps)
        return rms_norm(out, weight, self.config.norm_eps, residual=residual)

    def _post(self, out: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return out if weight is None else rms_norm(out, weight, self.config.norm_eps)

    def _attend(self, layer: _FusedLayer, normed: torch.Tensor, batch: GpuBatch, kv: KvLayer) -> torch.Tensor:
        """Project, rotate, store, attend: (rows, width) to (rows, query_size)."""
        config, parts, scale = self.config, layer.parts, self._decoder.attention_scale
        heads, decodes = config.heads, batch.decodes
        split = layer.qkv(normed).view(-1, heads + 2 * config.kv_heads, config.head_dim)
        rope_store(
            split,
            batch.positions,
            batch.slots,
            self._turns[parts.rope],
            kv,
            heads=heads,
            query_norm=parts.query_norm,
            key_norm=parts.key_norm,
            eps=config.norm_eps,
        )
        query = split[:, :heads]
        out = normed.new_empty(len(query), heads, config.head_dim)
        if decodes:
            tables, lengths = batch.tables[:decodes], batch.lengths[:decodes]
            paged_attention(query[:decodes], kv, tables, lengths, scale, window=parts.window, out=out[:decodes])
        if batch.most_queries:
            prefill_attention(
                query[decodes:],
                kv,
                batch.tables[decodes:],
                batch.starts,
                batch.lengths[decodes:],
                scale,
                most_queries=batch.most_queries,
                window=parts.window,
                out=out[decodes:],
            )
        return out.view(-1, config.query_size)

    def _mlp(self, layer: _FusedLayer, normed: torch.Tensor) -> torch.Tensor:
        activation = self._decoder.activation
        if isinstance(layer.mlp, StackedExperts):
            return mixture(normed, layer.mlp, activation)
        return layer.mlp.down(_ACTIVATIONS[activation](layer.mlp.gate_up(normed)))


def _project(x: torch.Tensor, projection: Projection[Matrix]) -> torch.Tensor:
    if isinstance(projection.weight, torch.Tensor):
        return functional.linear(x, projection.weight, projection.bias)
    return quant_matmul(x, projection.weight, bias=projection.bias)


def _rows(matrix: Matrix) -> int:
    return matrix.shape[0] if isinstance(matrix, torch.Tensor) else matrix.rows


def _fuse_layer(layer: DecoderLayer[Matrix], dtype: torch.dtype) -> _FusedLayer:
    if isinstance(layer.mlp, Experts):
        experts = [(_one(_gate_up(mlp, dtype)), mlp.down.weight) for mlp in layer.mlp.experts]
        mlp: _FusedMlp | StackedExperts = stack_experts(layer.mlp.router, experts, layer.mlp.active)
    else:
        mlp = _FusedMlp(_gate_up(layer.mlp, dtype), _fuse(dtype, layer.mlp.down))
    return _FusedLayer(
        parts=layer, qkv=_fuse(dtype, layer.query, layer.key, layer.value), output=_fuse(dtype, layer.output), mlp=mlp
    )


def _gate_up(mlp: Mlp[Matrix], dtype: torch.dtype) -> _Fused:
    return _fuse(dtype, mlp.gate, mlp.up)


def _one(fused: _Fused) -> Matrix:
    """The one matrix of projections that fit together, as gate and up of an expert always do."""
    [part] = fused.parts
    return part.weight


def _fuse(dtype: torch.dtype, *parts: Projection[Matrix]) -> _Fused:
    """One matrix where all parts are dense, or quantized alike."""
    rows = sum(_rows(part.weight) for part in parts)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat(biases).to(dtype) if biases else None
    if len(parts) == 1:
        return _Fused((Projection(parts[0].weight, bias),), rows)
    weight = _joined([part.weight for part in parts])
    if weight is None or len(biases) not in (0, len(parts)):
        cast = (Projection(part.weight, None if part.bias is None else part.bias.to(dtype)) for part in parts)
        return _Fused(tuple(cast), rows)
    return _Fused((Projection(weight, bias),), rows)


def _joined(matrices: list[Matrix]) -> Matrix | None:
    """The rows of all below one another; None where their formats differ. The parts become views of it."""
    dense = [matrix for matrix in matrices if isinstance(matrix, torch.Tensor)]
    if len(dense) == len(matrices):
        return _concatenated(dense, 0)
    codes = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    first = codes[0]
    kinds = {(one.format, one.group, one.minimums is None, one.scales.dim()) for one in codes}
    if len(codes) < len(matrices) or len(kinds) > 1 or first.scales.dim() == 0:
        return None
    minimums = [one.minimums for one in codes if one.minimums is not None]
    return QuantizedMatrix(
        format=first.format,
        codes=_concatenated([one.codes for one in codes], 0),
        scales=_concatenated([one.scales for one in codes], -1),
        minimums=_concatenated(minimums, -1) if minimums else None,
        group=first.group,
        cols=first.cols,
    )


def _concatenated(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """The parts behind one another; they become views of it, so that no weight is held twice."""
    whole = torch.cat(parts, dim)
    for part, view in zip(parts, torch.split(whole, [part.shape[dim] for part in parts], dim), strict=True):
        part.data = view
    return whole
