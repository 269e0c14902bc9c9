"""What the GPU's attention kernels are compared with: the definition, a sequence and a head at a time, in float64."""

from __future__ import annotations

import torch

from meshlm.kernels.gpu.kv_cache import KvLayer


def dequantize_kv(layer: KvLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values: (blocks, kv_heads, block_size, head_dim) float64."""
    return _dequantized(layer, layer.keys, layer.key_scales), _dequantized(layer, layer.values, layer.value_scales)


def _dequantized(layer: KvLayer, stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    codes = torch.cat([stored & 15, stored >> 4], -1).double() - 8 if layer.format == "int4" else stored.double()
    if scales is None:
        return codes
    return codes * (scales.double()[:, None, None] if layer.format == "fp8" else scales.double()[..., None])


def reference_attention(
    query: torch.Tensor,
    layer: KvLayer,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sink_tokens: int = 0,
    sink_logits: torch.Tensor | None = None,
    tree: torch.Tensor | None = None,
) -> torch.Tensor:
    """Arguments as of `gpu.prefill_attention`; decode is one query a sequence, `starts` being 0, 1, 2, ...

    Returns (rows, heads, head_dim) float64; rows of no sequence, and those that see nothing, are 0.
    """
    keys, values = dequantize_kv(layer)
    heads, group = query.shape[1], query.shape[1] // layer.kv_heads
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for sequence, length in enumerate(lengths.tolist()):
        begin, end = starts[sequence : sequence + 2].tolist()
        blocks = tables[sequence, : -(-length // layer.block_size)].long()
        nodes = None if tree is None else tree[begin:end]
        seen = visible(end - begin, length, window, sink_tokens, nodes).to(query.device)
        for head in range(heads if length else 0):
            stored_keys = keys[blocks, head // group].flatten(0, 1)[:length]
            stored_values = values[blocks, head // group].flatten(0, 1)[:length]
            scores = query[begin:end, head].double() @ stored_keys.T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~seen, -torch.inf)
            if sink_logits is not None:
                scores = torch.cat([scores, sink_logits[head].double().expand(len(scores), 1)], 1)
            weights = torch.softmax(scores, -1).nan_to_num(0.0)[:, :length]
            out[begin:end, head] = weights @ stored_values
    return out


def visible(queries: int, length: int, window: int | None, sink_tokens: int, tree: torch.Tensor | None) -> torch.Tensor:
    """Which of `length` tokens each of the last `queries` of them sees: (queries, length) bool."""
    base = length - queries
    seen = torch.zeros(queries, length, dtype=torch.bool)
    for row in range(queries):
        bits = None if tree is None else int(tree[row]) & (1 << 64) - 1
        position = base + (row if bits is None else bits.bit_count() - 1)
        for token in range(length):
            if bits is not None and token >= base:
                seen[row, token] = bool(bits >> (token - base) & 1)
            else:
                near = window is None or token > position - window or token < sink_tokens
                seen[row, token] = token <= position and near
    return seen
