"""Plans that were measured, kept in the user's cache folder by the revision of a model's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from meshlm.worker.config import default_cache_dir
from meshlm.worker.loading.revision import model_revision
from meshlm.worker.quantization.plan import AUTO, INT4, INT8, NONE, Format, Plan

log = structlog.get_logger()

_VERSION = 1  # of what is kept: plans of another one are measured anew


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan for `auto`, and what was measured when it was made."""

    formats: Mapping[str, Format]  # by canonical name
    importance: Mapping[str, torch.Tensor]  # (cols,) each
    keep_blocks: bool  # whether a file's own blocks stay as they are
    bound: float  # of the divergence, nats a token
    kl: float  # of the whole plan on the calibration text
    tokens: int  # of that text
    bits: float  # a weight, over the matrices in `formats`

    @property
    def plan(self) -> Plan:
        return Plan("auto", Format.INT8, self.formats, self.keep_blocks, importance=self.importance)


def plan_path(folder: Path, revision: str) -> Path:
    return folder / f"{revision}.safetensors"


def keep(folder: Path, revision: str, measured: Measured) -> Path:
    """Written aside and renamed: a worker may start at the same time. Raises OSError."""
    target = plan_path(folder, revision)
    target.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "version": _VERSION,
        "formats": {name: str(wanted) for name, wanted in measured.formats.items()},
        "keep_blocks": measured.keep_blocks,
        "bound": measured.bound,
        "kl": measured.kl,
        "tokens": measured.tokens,
        "bits": measured.bits,
    }
    aside = target.with_suffix(".new")
    tensors = {name: values.contiguous() for name, values in measured.importance.items()}
    save_file(tensors, aside, metadata={"plan": json.dumps(facts)})
    aside.replace(target)
    return target


def kept(folder: Path, revision: str) -> Measured | None:
    """None where nothing is kept, or nothing that this version can read: a plan can always be measured again."""
    try:
        with safe_open(plan_path(folder, revision), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["plan"])
            if facts["version"] != _VERSION:
                return None
            importance = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        formats = {name: Format(wanted) for name, wanted in facts["formats"].items()}
        rest = {name: facts[name] for name in ("keep_blocks", "bound", "kl", "tokens", "bits")}
        return Measured(formats, importance, **rest)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def plans_folder() -> Path:
    """Beside the digests of model files, in the user's cache folder."""
    return default_cache_dir().with_name("quantization")


def plan_for(quantization: str, path: Path) -> Plan:
    """The plan of a worker's setting `quantization` for the model at `path`: none, int8, int4 or auto.

    `auto` takes the plan that `meshlm quantize` kept for these weights, and the default one where there is none; int8
    and int4 take what it learned of the importance of columns. Raises ModelFileError: the model cannot be read.
    """
    plain = {plan.name: plan for plan in (NONE, INT8, INT4, AUTO)}[quantization]
    folder = plans_folder()
    if quantization == "none" or not folder.is_dir():
        return plain  # naming a model reads every byte of it: worth while only where some plan could have that name
    measured = kept(folder, model_revision(path, default_cache_dir()))
    if measured is None:
        log.info("weights were not measured; `meshlm quantize` does it", model=str(path), quantization=quantization)
        return plain
    if quantization != "auto":
        return replace(plain, importance=measured.importance)
    log.info("weights as measured", model=str(path), bits=round(measured.bits, 2), kl=round(measured.kl, 5))
    return measured.plan
