"""What a step on a GPU is told, in one buffer that goes to the device in one copy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from meshlm.worker.engine.draws import uniform
from meshlm.worker.engine.flight import Row
from meshlm.worker.engine.sequence import Chunk

_MOST_TOP_K = 1 << 30  # a request may ask for more than an int32 holds

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step: rows of the flat batch, sequences (decoding ones, then prefill chunks), prefill chunks, rows of
    which a token is drawn, and the width of a block table.
    """

    rows: int
    sequences: int
    prefills: int
    draws: int
    most_blocks: int

    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The fields of a step in the order of memory, the large one last."""
        whole, real = torch.int32, torch.float32
        return {
            "uniform": (torch.float64, (self.draws,)),
            "temperature": (real, (self.draws,)),
            "top_p": (real, (self.draws,)),
            "min_p": (real, (self.draws,)),
            "top_k": (whole, (self.draws,)),
            "samples": (whole, (self.draws,)),
            "tokens": (whole, (self.rows,)),
            "source": (whole, (self.rows,)),
            "positions": (whole, (self.rows,)),
            "slots": (whole, (self.rows,)),
            "lengths": (whole, (self.sequences,)),
            "starts": (whole, (self.prefills + 1,)),
            "tables": (whole, (self.sequences, self.most_blocks)),
        }

    @property
    def nbytes(self) -> int:
        return sum(_aligned(dtype.itemsize * math.prod(shape)) for dtype, shape in self.fields().values())


@dataclass(frozen=True, slots=True)
class DeviceInputs:
    """A step's inputs on the device, views of one buffer.

    uniform: (draws,) float64; temperature, top_p, min_p: (draws,) float32; top_k: (draws,) int32; samples: (draws,)
    int32, the rows to draw of; source: (rows,) int32, where below 0 the row's token is in `tokens`, else it is the one
    of this number that the step before drew. The others: see GpuBatch.
    """

    uniform: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    samples: torch.Tensor
    tokens: torch.Tensor
    source: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    tables: torch.Tensor


def device_inputs(shape: StepShape, memory: torch.Tensor) -> DeviceInputs:
    """Views of `memory`, (at least shape.nbytes,) uint8."""
    return DeviceInputs(**_views(shape, memory))


def _aligned(size: int) -> int:
    """Rounded up: Triton compiles a kernel anew for a pointer that 16 does not divide, in the middle of serving."""
    return -(-size // 16) * 16


def _views(shape: StepShape, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    views: dict[str, torch.Tensor] = {}
    start = 0
    for name, (dtype, size) in shape.fields().items():
        end = start + dtype.itemsize * math.prod(size)
        views[name] = memory[start:end].view(dtype).view(size)
        start += _aligned(end - start)
    return views


class HostInputs:
    """The host's side of a step's inputs, filled again and again.

    `arrays` are numpy views of the fields, by name. A buffer is not to be filled while its copy is under way: `ready`
    waits for it.
    """

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        self._device = device
        self._memory = torch.zeros(shape.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.arrays: dict[str, Array] = {name: view.numpy() for name, view in _views(shape, self._memory).items()}
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._tables: list[tuple[list[int], int] | None] = [None] * shape.sequences

    def ready(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, memory: torch.Tensor) -> None:
        """Starts the copy into `memory`, (at least shape.nbytes,) uint8 on the device."""
        memory[: len(self._memory)].copy_(self._memory, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def fill_rows(self, rows: list[Row], block_size: int) -> None:
        """A step of one row a sequence; the rest of the buffer's rows store nothing and attend to nothing."""
        fields, count = self.arrays, len(rows)
        fields["tokens"][:count] = [row.sequence.tokens[row.position] if row.source < 0 else 0 for row in rows]
        fields["source"][:count] = [row.source for row in rows]
        fields["positions"][:count] = [row.position for row in rows]
        fields["slots"][:count] = [_slot(row.sequence.blocks, row.position, block_size) for row in rows]
        fields["lengths"][:count] = [row.position + 1 for row in rows]
        for number, row in enumerate(rows):
            self._set_table(number, row.sequence.blocks)
        for name in ("tokens", "positions", "lengths", "temperature"):
            fields[name][count:] = 0
        for name in ("source", "slots"):
            fields[name][count:] = -1
        self._tables[count:] = [None] * (len(self._tables) - count)
        self.fill_draws(rows)

    def fill_chunks(self, chunks: list[Chunk], order: list[int], block_size: int) -> list[int]:
        """A step of any chunks, in this order of their rows. Returns the first row of each chunk, by its number."""
        fields, first_rows, row = self.arrays, [0] * len(chunks), 0
        fields["source"][:] = -1
        starts = [0]
        for place, number in enumerate(order):
            chunk = chunks[number]
            blocks, end = chunk.sequence.blocks, chunk.start + chunk.count
            positions, rows = np.arange(chunk.start, end), slice(row, row + chunk.count)
            fields["tokens"][rows] = chunk.sequence.tokens[chunk.start : end]
            fields["positions"][rows] = positions
            table = np.asarray(blocks[: -(-end // block_size)])
            fields["slots"][rows] = table[positions // block_size] * block_size + positions % block_size
            fields["tables"][place, : len(table)] = table
            fields["lengths"][place] = end
            if chunk.count > 1:
                starts.append(starts[-1] + chunk.count)
            first_rows[number] = row
            row += chunk.count
        fields["starts"][:] = starts
        drawing = [number for number, chunk in enumerate(chunks) if chunk.sample]
        fields["samples"][:] = [first_rows[number] + chunks[number].count - 1 for number in drawing]
        self.fill_draws([Row(chunk.sequence, chunk.start + chunk.count - 1) for chunk in chunks if chunk.sample])
        return first_rows

    def fill_draws(self, rows: list[Row]) -> None:
        """How to draw behind each row."""
        fields, count = self.arrays, len(rows)
        samplings = [row.sequence.request.sampling for row in rows]
        for name in ("temperature", "top_p", "min_p"):
            fields[name][:count] = [getattr(sampling, name) for sampling in samplings]
        fields["top_k"][:count] = [min(sampling.top_k, _MOST_TOP_K) for sampling in samplings]
        fields["uniform"][:count] = [
            uniform(sampling.seed, row.output_index) if sampling.temperature > 0 else 0.0
            for row, sampling in zip(rows, samplings, strict=True)
        ]

    def _set_table(self, row: int, blocks: list[int]) -> None:
        """Writes what is new of a block table, where the row has the rest of this very list."""
        known, end = self._tables[row], min(len(blocks), self.shape.most_blocks)
        start = known[1] if known is not None and known[0] is blocks else 0
        if start < end:
            self.arrays["tables"][row, start:end] = blocks[start:end]
        self._tables[row] = (blocks, end)


def _slot(blocks: list[int], position: int, block_size: int) -> int:
    return blocks[position // block_size] * block_size + position % block_size
