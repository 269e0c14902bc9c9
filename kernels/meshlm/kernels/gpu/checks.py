"""What a kernel's arguments must be, asked before the launch: afterwards a wrong one is a crash, or a wrong answer."""

from __future__ import annotations

from collections.abc import Collection

import torch

from meshlm.kernels.gpu.dot import INTERPRETED


class ArgumentError(ValueError):
    """An argument that a kernel cannot work with."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument


def require(holds: bool, argument: str, problem: str) -> None:
    """Raises ArgumentError unless `holds`."""
    if not holds:
        raise ArgumentError(argument, problem)


def require_tensor(
    argument: str,
    tensor: torch.Tensor,
    *,
    shape: tuple[int | None, ...],
    dtypes: Collection[torch.dtype],
    device: torch.device,
) -> None:
    """Raises ArgumentError unless `tensor` has this shape (None: any size), one of these dtypes, lies on this device,
    and has elements of the last dimension beside one another."""
    fits = tensor.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    require(fits, argument, f"is of shape {tuple(tensor.shape)}, must be {_shown(shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ArgumentError(argument, f"is of {str(tensor.dtype).removeprefix('torch.')}, must be one of: {names}")
    require(tensor.device == device, argument, f"is on {tensor.device}, must be on {device}")
    if tensor.dim() and tensor.shape[-1] > 1:
        require(tensor.stride(-1) == 1, argument, f"has stride {tensor.stride(-1)} in its last dimension, must be 1")


def _shown(shape: tuple[int | None, ...]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes})"


def require_runs_on(device: torch.device, argument: str) -> None:
    """Raises ArgumentError unless kernels run on this device: CUDA, or a CPU under Triton's interpreter."""
    runs = device.type == "cuda" or (device.type == "cpu" and bool(INTERPRETED.value))
    require(runs, argument, f"is on {device}, must be on a CUDA device, or on a CPU with TRITON_INTERPRET=1")


def require_capability(device: torch.device, least: tuple[int, int], what: str) -> None:
    """Raises ArgumentError where a CUDA device is older than `least`. A CPU, which interprets, can all."""
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    require(found >= least, what, f"needs compute capability {least[0]}.{least[1]}, {device} has {found[0]}.{found[1]}")
