"""A model from a Hugging Face folder: config.json and safetensors, in one file or sharded with an index."""

from __future__ import annotations

import re
from collections.abc import Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.hugging_face_config import read_config
from meshlm.worker.loading.json_file import read_json
from meshlm.worker.loading.sources import Source, Sources, cut, cut_gate_up, cut_qkv, expert_name, unstack
from meshlm.worker.models.config import ModelConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_READABLE = frozenset({torch.float32, torch.float16, torch.bfloat16})
# Gemma 3 with eyes keeps its language model one level down.
_NESTED = re.compile(r"^(?:language_model\.model|model\.language_model)\.(?=embed_tokens|layers|norm)")


def open_folder(folder: Path) -> Checkpoint:
    """Raises ModelFileError: a file missing or damaged, or an unknown architecture."""
    config = read_config(folder)
    owner = _tensor_files(folder)
    sources = canonical_sources(owner.keys(), config)

    def read(name: str) -> torch.Tensor:
        source = sources[name]
        path = folder / owner[source.stored]
        tensor = _read_part(path, source)
        if tensor.dtype not in _READABLE:
            raise ModelFileError(path, f"{name} has the type {tensor.dtype}, which cannot be read")
        if config.architecture == "gemma3" and name.endswith("norm.weight"):
            return tensor.float() + 1
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    return Checkpoint(folder, config, sources.keys(), read)


def canonical_sources(stored: Set[str], config: ModelConfig) -> Sources:
    found: dict[str, Source] = {}
    for name in stored:
        found |= _sources_in(name, config)
    return found


def _sources_in(stored: str, config: ModelConfig) -> dict[str, Source]:
    name = _NESTED.sub("model.", stored).removeprefix("language_model.")
    layer = re.fullmatch(r"(model\.layers\.\d+)\.(.+?)(?:\.(weight|bias))?", name)
    if layer is None:
        return {name: Source(stored)}
    prefix, part, kind = layer.groups()
    if part == "self_attn.qkv_proj":
        return cut_qkv(stored, prefix, kind, config)
    if part == "mlp.gate_up_proj":
        return cut_gate_up(stored, prefix, kind, config)
    if part == "mlp.experts.gate_up_proj":  # the experts' stack, as transformers 5 holds it
        return _cut_stack(stored, prefix, config)
    if part == "mlp.experts.down_proj":
        return unstack(stored, prefix, "w2", config)
    if part == "mlp.gate" and config.experts:
        return {f"{prefix}.block_sparse_moe.gate.weight": Source(stored)}
    return {name: Source(stored)}


def _cut_stack(stored: str, prefix: str, config: ModelConfig) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for member in range(config.experts):
        names = [(expert_name(prefix, member, part), config.intermediate_size) for part in ("w1", "w3")]
        found |= cut(stored, names, member)
    return found


def _read_part(path: Path, source: Source) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            if source.member is None and source.rows is None:
                whole: torch.Tensor = file.get_tensor(source.stored)
                return whole
            view = file.get_slice(source.stored)
            rows = slice(None) if source.rows is None else slice(*source.rows)
            part: torch.Tensor = view[rows] if source.member is None else view[source.member, rows]
            return part
    except (SafetensorError, OSError, IndexError) as error:
        raise ModelFileError(path, f"{source.stored} cannot be read: {error}") from None


def _tensor_files(folder: Path) -> dict[str, str]:
    """Tensor name to file name."""
    if (folder / INDEX).exists():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise ModelFileError(folder / INDEX, "no weight_map in it")
        for name in sorted(set(mapping.values())):
            if Path(name).name != name:  # an index must not lead out of its folder
                raise ModelFileError(folder / INDEX, f"{name!r} is not a plain file name")
            _tensor_names(folder / name)
        return mapping
    return dict.fromkeys(_tensor_names(folder / SINGLE), SINGLE)


def _tensor_names(path: Path) -> list[str]:
    if not path.is_file():
        raise ModelFileError(path, "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelFileError(path, f"damaged or truncated: {error}") from None
