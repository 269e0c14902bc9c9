"""The seam between file formats and models: a config, and tensors by canonical names.

Canonical names are Hugging Face's for Llama, whatever the file and the architecture; loaders rename, cut fused and
stacked tensors apart, undo row orders, and add Gemma's "+ 1", so that models see one thing:

    model.embed_tokens.weight, model.norm.weight, lm_head.weight (unless it is tied)
    model.layers.N.
        input_layernorm.weight                              before attention
        self_attn.{q,k,v,o}_proj.{weight,bias}              queries and keys for rotary pairs of split halves
        self_attn.{q,k}_norm.weight                         (head_dim,): Qwen3, Gemma 3
        post_attention_layernorm.weight                     before the MLP; in Gemma 3 behind attention, which has also
        {pre,post}_feedforward_layernorm.weight             before and behind the MLP
        mlp.{gate,up,down}_proj.{weight,bias}
        block_sparse_moe.gate.weight                        Mixtral's router, (experts, width), and its experts':
        block_sparse_moe.experts.E.{w1,w2,w3}.weight        gate, down and up
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from meshlm.kernels.quantize import GroupQuantized
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.models.config import ModelConfig


def _never_quantized(name: str) -> GroupQuantized | None:
    return None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk. Tensors are read one at a time, so that a load never holds the model twice."""

    path: Path
    config: ModelConfig
    names: Set[str]  # canonical
    read: Callable[[str], torch.Tensor]  # on the CPU, in the file's float type (float32 for quantized GGUF)
    # A matrix as the file's own codes, where they can be taken over without a loss beyond fp16 scales; else None.
    read_quantized: Callable[[str], GroupQuantized | None] = _never_quantized

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """Raises ModelFileError: missing, or of another shape than asked for."""
        self._require(name)
        found = self.read(name)
        self._check_shape(name, tuple(found.shape), shape)
        return found

    def quantized(self, name: str, rows: int, cols: int) -> GroupQuantized | None:
        """`read_quantized`, checked as `tensor` is. Raises ModelFileError."""
        self._require(name)
        found = self.read_quantized(name)
        if found is not None:
            self._check_shape(name, found.shape, (rows, cols))
        return found

    def _require(self, name: str) -> None:
        if name not in self.names:
            raise ModelFileError(self.path, f"the tensor {name} is missing")

    def _check_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise ModelFileError(self.path, f"{name} has the shape {found}; the config asks for {wanted}")
