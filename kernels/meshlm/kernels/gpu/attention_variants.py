"""The models whose attention is compiled without a GPU, and the types of what the attention kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshlm.kernels.gpu.kv_cache import KvFormat
from meshlm.kernels.gpu.variants import ARCHITECTURES, FP8_ARCHITECTURES

BLOCK_SIZE = 64  # of variants; MODELS that differ say so


@dataclass(frozen=True, slots=True)
class Model:
    """heads and kv_heads: of one GPU's share. softcap: scores are capped."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    windowed: bool = False
    softcapped: bool = False
    block_size: int = BLOCK_SIZE


LLAMA_8B = Model("llama-3-8b", 32, 8, 128)
LLAMA_8B_SMALL_BLOCKS = Model("llama-3-8b/blocks-of-16", 32, 8, 128, block_size=16)
LLAMA_70B = Model("llama-3-70b/8", 8, 1, 128)
SMOLLM2 = Model("smollm2-135m", 9, 3, 64)
GEMMA = Model("gemma", 4, 1, 256, windowed=True, softcapped=True)
PHI_3 = Model("phi-3-mini", 32, 32, 96, windowed=True)

_KEYS: dict[KvFormat, str] = {
    "float32": "*fp32:16",
    "float16": "*fp16:16",
    "bfloat16": "*bf16:16",
    "fp8": "*fp8e4nv:16",
    "int8": "*i8:16",
    "int4": "*u8:16",
}


def architectures(kv_format: KvFormat) -> tuple[int, ...]:
    return FP8_ARCHITECTURES if kv_format == "fp8" else ARCHITECTURES


def types_and_constants(model: Model, kv_format: KvFormat) -> tuple[dict[str, str], dict[str, Any]]:
    """Of the arguments that all attention kernels have. Activations are bfloat16."""
    types = dict.fromkeys(("query", "out"), "*bf16:16")
    types |= dict.fromkeys(("query_row", "query_head", "out_row", "out_head"), "i32:16")
    types |= dict.fromkeys(("keys", "values"), _KEYS[kv_format])
    types |= dict.fromkeys(("blocks", "table_row", "width", "window", "sink_tokens"), "i32")
    types |= dict.fromkeys(("tables", "lengths", "starts"), "*i32")
    types |= dict.fromkeys(("scale", "softcap"), "fp32")
    types |= dict.fromkeys(("outputs", "sums"), "*fp32:16")
    types["tree"] = "*i64"
    constants: dict[str, Any] = {"sink_logits": None, "WINDOWED": model.windowed, "SOFTCAPPED": model.softcapped}
    if kv_format in ("fp8", "int8", "int4"):
        types |= dict.fromkeys(("key_scales", "value_scales"), "*fp32:16" if kv_format == "fp8" else "*fp16:16")
    else:
        constants |= {"key_scales": None, "value_scales": None}
    return types, constants
