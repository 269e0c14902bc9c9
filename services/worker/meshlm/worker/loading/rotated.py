"""The same model with its residual stream turned by a fixed rotation, for int8.

SmolLM2's and most models' residual streams have a few elements a hundred times the rest, and one int8 scale a row then
leaves the rest few steps. RMS normalization commutes with a rotation once its weight is folded into the products that
follow, so the embedding and what writes to the stream are turned forth, what reads from it back, and the model's
function is unchanged (QuaRot's first rotation, arXiv:2404.00456). It costs nothing at run time.
"""

from __future__ import annotations

import dataclasses

import torch

from meshlm.kernels.rotation import random_rotation
from meshlm.worker.loading.checkpoint import Checkpoint

_EMBEDDING, _HEAD, _LAST_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_NORM_BEFORE = {
    "self_attn.q_proj.weight": "input_layernorm.weight",
    "self_attn.k_proj.weight": "input_layernorm.weight",
    "self_attn.v_proj.weight": "input_layernorm.weight",
    "mlp.gate_proj.weight": "post_attention_layernorm.weight",
    "mlp.up_proj.weight": "post_attention_layernorm.weight",
}
_WRITES = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")


def rotated(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of the Llama family that gives turned float32 tensors; its head is never tied."""
    turn = random_rotation(checkpoint.config.hidden_size).float()

    def read(name: str) -> torch.Tensor:
        if name == _HEAD:
            head = checkpoint.read(_EMBEDDING if checkpoint.config.tied_head else _HEAD)
            return (head.float() * checkpoint.read(_LAST_NORM).float()) @ turn
        tensor = checkpoint.read(name).float()
        if name.endswith("norm.weight"):
            return torch.ones_like(tensor)
        if name == _EMBEDDING:
            return tensor @ turn
        if name.endswith(_WRITES):
            return turn.T @ tensor
        layer, part = name.rsplit(".", 3)[0], ".".join(name.rsplit(".", 3)[1:])
        if part in _NORM_BEFORE:
            return (tensor * checkpoint.read(f"{layer}.{_NORM_BEFORE[part]}").float()) @ turn
        return tensor

    config = dataclasses.replace(checkpoint.config, tied_head=False)
    return Checkpoint(checkpoint.path, config, checkpoint.names | {_HEAD}, read)
