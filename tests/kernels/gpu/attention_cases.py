"""Random caches and batches for the tests of attention."""

from __future__ import annotations

import torch

from meshlm.kernels.gpu.kv_cache import KvFormat, KvLayer, allocate_kv_layer

FORMATS: tuple[KvFormat, ...] = ("float32", "float16", "bfloat16", "fp8", "int8", "int4")


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Of Frobenius norms. Not a number where `ours` has one that is none."""
    return float((ours.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


def tables_of(lengths: list[int], width: int, blocks: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Disjoint tables of shuffled blocks, whose unused places hold what is no block's number."""
    free = torch.randperm(blocks).tolist()
    tables = torch.full((len(lengths), width), 1 << 30, dtype=torch.int32)
    for row, length in enumerate(lengths):
        used = -(-length // block_size)
        tables[row, :used] = torch.tensor([free.pop() for _ in range(used)], dtype=torch.int32)
    return tables.to(device)


def filled_layer(
    kv_format: KvFormat,
    kv_heads: int,
    block_size: int,
    head_dim: int,
    lengths: list[int],
    tables: torch.Tensor,
    blocks: int,
) -> KvLayer:
    """Random contents where the sequences have tokens; all else is not a number, or the largest."""
    device = tables.device
    layer = allocate_kv_layer(kv_format, blocks, kv_heads, block_size, head_dim, device)
    written = torch.zeros(blocks, block_size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for position in range(length):
            written[int(tables[row, position // block_size]), position % block_size] = True
    inside = written.to(device)[:, None, :].expand(blocks, kv_heads, block_size)
    for codes in (layer.keys, layer.values):
        if codes.is_floating_point():
            filling = torch.randn(codes.shape, device=device).masked_fill(~inside[..., None], torch.nan)
            codes.copy_(filling.to(codes.dtype))
        else:
            low, end = (-127, 128) if codes.dtype == torch.int8 else (0, 256)
            codes.copy_(torch.randint(low, end, codes.shape, device=device))
    for scales in (layer.key_scales, layer.value_scales):
        if scales is None:
            continue
        random = torch.rand(scales.shape, device=device) + 0.5
        if kv_format == "fp8":
            scales.copy_(random)
        else:
            scales.copy_((random / (64 if kv_format == "int8" else 4)).masked_fill(~inside, torch.nan))
    return layer
