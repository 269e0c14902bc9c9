"""The same function with its channels in another order, so that groups of columns hold other weights.

The weights of a file that is quantized already lie on that file's grid, and to find the grid again is no feat. With
the channels shuffled, a group of 32 mixes weights of many of the file's groups: formats have to approximate them as
they would a float model's. What the model computes stays the same, up to the rounding of sums.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.config import ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_READ_STREAM = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "gate"})
_WRITE_STREAM = frozenset({"o_proj", "down_proj", "w2"})
_READ_MIDDLE, _WRITE_MIDDLE = frozenset({"down_proj", "w2"}), frozenset({"gate_proj", "up_proj", "w1", "w3"})


def regrouped(checkpoint: Checkpoint, seed: int = 0) -> Checkpoint:
    """The residual stream, each MLP's middle and each head's values, shuffled. No block of the file is left."""
    config = checkpoint.config

    def read(name: str) -> torch.Tensor:
        return _shuffled(checkpoint.read(name), name, config, seed)

    return replace(checkpoint, read=read, read_quantized=lambda name: None)


def _shuffled(tensor: torch.Tensor, name: str, config: ModelConfig, seed: int) -> torch.Tensor:
    stream = _order(config.hidden_size, seed)
    match = _LAYER.fullmatch(name)
    if match is None:  # embedding, head, last norm
        return tensor[..., stream]
    layer, path, kind = int(match[1]), match[2], match[3]
    part, last = path.rsplit(".", 1)[-1], tensor.ndim - 1
    if part.endswith("layernorm"):
        return tensor[stream]
    if part in _READ_STREAM and kind == "weight":
        tensor = tensor[:, stream]
    if part in _WRITE_STREAM:
        tensor = tensor[stream]
    middle = _order(config.intermediate_size, seed + 1 + layer)
    if part in _WRITE_MIDDLE:
        tensor = tensor[middle]
    if part in _READ_MIDDLE and kind == "weight":
        tensor = tensor[:, middle]
    if part == "v_proj":
        tensor = tensor[_values(config, seed + layer, 1)]
    if part == "o_proj" and last == 1:
        tensor = tensor[:, _values(config, seed + layer, config.heads // config.kv_heads)]
    return tensor


def _order(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _values(config: ModelConfig, seed: int, repeats: int) -> torch.Tensor:
    """The order of a layer's value elements: each KV head its own, and so the `repeats` query heads that read it."""
    dim = config.head_dim
    orders = [_order(dim, seed * config.kv_heads + head) for head in range(config.kv_heads) for _ in range(repeats)]
    return torch.cat([order + dim * index for index, order in enumerate(orders)])
