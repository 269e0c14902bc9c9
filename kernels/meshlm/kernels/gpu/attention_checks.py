"""What the attention kernels ask of their arguments."""

from __future__ import annotations

import torch

from meshlm.kernels.gpu.checks import require, require_capability, require_runs_on, require_tensor
from meshlm.kernels.gpu.kv_cache import FLOATS, KvLayer

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEAD_DIM = 256


def check_layer(layer: KvLayer, device: torch.device) -> None:
    """Raises ArgumentError unless keys, values and scales are what KvLayer says, contiguous and on this device."""
    blocks, kv_heads, block_size, stored = layer.keys.shape if layer.keys.dim() == 4 else (0, 0, 0, 0)
    require(blocks > 0, "layer.keys", f"is of shape {tuple(layer.keys.shape)}, must be of 4 dimensions and not empty")
    others = {"int8": torch.int8, "int4": torch.uint8}
    dtype = FLOATS[layer.format] if layer.format in FLOATS else others[layer.format]
    fixed, per_token = (kv_heads,), (blocks, kv_heads, block_size)
    for name, codes in (("keys", layer.keys), ("values", layer.values)):
        require_tensor(f"layer.{name}", codes, shape=(blocks, kv_heads, block_size, stored), dtypes=(dtype,), device=device)  # noqa: E501  # fmt: skip
        require(codes.is_contiguous(), f"layer.{name}", "is not contiguous")
    for name, scales in (("key_scales", layer.key_scales), ("value_scales", layer.value_scales)):
        argument = f"layer.{name}"
        if layer.format in ("float32", "float16", "bfloat16"):
            require(scales is None, argument, f"is given, {layer.format} has none")
            continue
        if scales is None:
            require(False, argument, f"is missing, {layer.format} has them")
            continue
        shape, of = (fixed, torch.float32) if layer.format == "fp8" else (per_token, torch.float16)
        require_tensor(argument, scales, shape=shape, dtypes=(of,), device=device)
        require(scales.is_contiguous(), argument, "is not contiguous")
    require(block_size & (block_size - 1) == 0, "layer", f"has blocks of {block_size} tokens, must be a power of two")
    size = layer.head_dim
    require(size % 8 == 0 and size <= MOST_HEAD_DIM, "layer", f"has heads of {size}, must be a multiple of 8 up to 256")
    if layer.format == "fp8":
        require_capability(device, (8, 9), "layer")


def check_attention(
    query: torch.Tensor,
    layer: KvLayer,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    window: int | None,
    softcap: float | None,
    sink_tokens: int,
    sink_logits: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    """Raises ArgumentError. Of tables and lengths the values are checked too where the host can read them, that is on a
    CPU; on a GPU that would stall the stream, and kernels are safe whatever they are."""
    device = query.device
    require_runs_on(device, "query")
    require_capability(device, (8, 0), "query")
    require_tensor("query", query, shape=(None, None, None), dtypes=ACTIVATIONS, device=device)
    check_layer(layer, device)
    heads, head_dim = query.shape[1:]
    require(head_dim == layer.head_dim, "query", f"has heads of {head_dim}, the layer of {layer.head_dim}")
    grouped = heads > 0 and heads % layer.kv_heads == 0
    require(grouped, "query", f"has {heads} heads, must be a multiple of the layer's {layer.kv_heads}")
    require_tensor("tables", tables, shape=(None, None), dtypes=(torch.int32,), device=device)
    require_tensor("lengths", lengths, shape=(tables.shape[0],), dtypes=(torch.int32,), device=device)
    require(window is None or window > 0, "window", f"is {window}, must be 1 or more, or None")
    require(softcap is None or softcap > 0, "softcap", f"is {softcap}, must be above 0, or None")
    require(sink_tokens >= 0, "sink_tokens", f"is {sink_tokens}, must be 0 or more")
    if sink_logits is not None:
        require_tensor("sink_logits", sink_logits, shape=(heads,), dtypes=(torch.float32,), device=device)
    if out is not None:
        require_tensor("out", out, shape=tuple(query.shape), dtypes=(query.dtype,), device=device)
    if device.type == "cpu":
        _check_values(layer, tables, lengths)


def _check_values(layer: KvLayer, tables: torch.Tensor, lengths: torch.Tensor) -> None:
    room = tables.shape[1] * layer.block_size
    fits = bool(((lengths >= 0) & (lengths <= room)).all())
    require(fits, "lengths", f"has one that is not within 0 and {room}, what a block table has room for")
    used = torch.arange(tables.shape[1]) * layer.block_size < lengths.unsqueeze(1)
    known = bool(((tables >= 0) & (tables < layer.blocks))[used].all())
    require(known, "tables", f"has a block out of range, the layer has {layer.blocks}")
