"""Launch configurations by device and shape: data, never searched for while serving.

`tuned/<device>.json` is written by the tuner (`benchmarks/tune_kernels.py`) on that device and checked in:

    {"quant_matmul": {"4,32,4096,14336,16": {"BLOCK_N": 128, "num_warps": 4}}}

A missing file, kernel or shape means the caller's default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

import torch

Config = Mapping[str, int]
Tuned = Mapping[str, Mapping[tuple[int, ...], Config]]  # by kernel and key


@dataclass(slots=True)
class Trial:
    """What the tuner tries. asked: the defaults of what was chosen meanwhile, by key."""

    kernel: str
    config: Config
    asked: dict[tuple[int, ...], Config] = field(default_factory=dict)


_trial: Trial | None = None


@contextmanager
def trying(kernel: str, config: Config) -> Iterator[Trial]:
    """For the tuner alone: `choose` answers with `config` for this kernel, whatever is tuned. Of a process, not of a
    thread."""
    global _trial
    _trial = Trial(kernel, config)
    try:
        yield _trial
    finally:
        _trial = None


def choose(kernel: str, key: tuple[int, ...], default: Config, device: torch.device) -> Config:
    """`default`, with what is tuned for `key` on this device's kind in place of it.

    key: what the best configuration depends on, such as bits, widths, and rows rounded up to a power of two.
    """
    if _trial is not None and _trial.kernel == kernel:
        _trial.asked[key] = default
        return {**default, **_trial.config}
    if device.type != "cuda":
        return default
    found = _tuned_on(device).get(kernel, {}).get(key)
    return default if found is None else {**default, **found}


def device_file(name: str) -> str:
    """The file of a device: "NVIDIA H100 80GB HBM3" is nvidia_h100_80gb_hbm3.json."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json"


@cache
def _tuned_on(device: torch.device) -> Tuned:
    """Asked at every launch, and so found by the device alone, its file read once. A device without a number is the one
    that was current when it was first asked for."""
    path = resources.files("meshlm.kernels.gpu") / "tuned" / device_file(torch.cuda.get_device_name(device))
    if not path.is_file():
        return {}
    return {
        kernel: {tuple(map(int, key.split(","))): config for key, config in by_key.items()}
        for kernel, by_key in json.loads(path.read_text()).items()
    }
