"""Steps on a GPU: launched without waiting, and their tokens fetched later."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from meshlm.kernels.gpu.kv_cache import KvFormat, allocate_kv_layer
from meshlm.worker.engine.flight import Flight, Reply, Row
from meshlm.worker.engine.gpu_graphs import DecodeGraphs
from meshlm.worker.engine.gpu_inputs import DeviceInputs, HostInputs, StepShape, device_inputs
from meshlm.worker.engine.gpu_sampler import GpuSampler
from meshlm.worker.engine.sequence import Chunk
from meshlm.worker.messages import ModelFacts
from meshlm.worker.models.gpu_decoder import GpuBatch, GpuDecoder


class GpuSteps:
    """A model, its KV cache, and what stays where it is between steps. All work is in one stream."""

    def __init__(self, model: GpuDecoder, facts: ModelFacts, kv_format: KvFormat, max_running: int) -> None:
        config, device = model.config, model.device
        self.model = model
        self.sampler = GpuSampler(max_running, facts.vocab_size, device)
        self.max_running = max_running
        self._size = facts.block_size
        self._device = device
        self._cache = [
            allocate_kv_layer(kv_format, facts.total_blocks, config.kv_heads, self._size, config.head_dim, device)
            for _ in range(config.layers)
        ]
        self._drawn = torch.zeros(max_running, dtype=torch.int32, device=device)
        self._logprobs = torch.zeros(max_running, dtype=torch.float32, device=device)
        self._graphs = DecodeGraphs(self._decode, max_running, device)
        width = -(-facts.max_context // self._size)
        shapes = {size: StepShape(size, size, 0, size, width) for size in self._graphs.sizes}
        self._memory = torch.zeros(shapes[max_running].nbytes, dtype=torch.uint8, device=device)
        self._inputs = {size: device_inputs(shape, self._memory) for size, shape in shapes.items()}
        # Of all sizes: what a graph puts out would stay taken in its pool, for each size anew.
        self._logits = torch.zeros(max_running, facts.vocab_size, dtype=torch.float32, device=device)
        # Two of each: the one of the step before may still be on its way.
        self._hosts = {size: cycle([HostInputs(shape, device) for _ in range(2)]) for size, shape in shapes.items()}
        self._replies = cycle([Reply(max_running, device) for _ in range(2)])

    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Captures the decode steps, where the device has graphs."""
        self._graphs.capture(progress)

    def release(self) -> None:
        """Gives up cache and graphs: their memory is free once this object is."""
        self._graphs.release()
        self._cache.clear()

    @torch.inference_mode()
    def decode(self, rows: list[Row]) -> Flight:
        """Launches a step of one row a sequence, at most `max_running`."""
        count = len(rows)
        size = self._graphs.size_for(count)
        host = next(self._hosts[size])
        host.ready()
        host.fill_rows(rows, self._size)
        host.copy_to(self._memory)
        self._graphs.run(size)
        return self._flight(rows, self._logits[:count], self._inputs[size])

    @torch.inference_mode()
    def mixed(self, chunks: list[Chunk]) -> Flight:
        """Launches a step of any chunks, at most `max_running`."""
        order = sorted(range(len(chunks)), key=lambda number: chunks[number].count > 1)  # single rows come first
        rows = [Row(chunk.sequence, chunk.start + chunk.count - 1) for chunk in chunks if chunk.sample]
        singles = sum(chunk.count == 1 for chunk in chunks)
        ends = [chunk.start + chunk.count for chunk in chunks]
        shape = StepShape(
            rows=sum(chunk.count for chunk in chunks),
            sequences=len(chunks),
            prefills=len(chunks) - singles,
            draws=len(rows),
            most_blocks=-(-max(ends) // self._size),
        )
        host = HostInputs(shape, self._device)
        first_rows = host.fill_chunks(chunks, order, self._size)
        memory = torch.empty(shape.nbytes, dtype=torch.uint8, device=self._device)
        host.copy_to(memory)
        inputs = device_inputs(shape, memory)
        most_queries = max((chunk.count for chunk in chunks if chunk.count > 1), default=0)
        residual = self.model.residual(_batch(inputs, inputs.tokens, singles, most_queries), self._cache)
        if rows:
            logits = self.model.logits(residual.index_select(0, inputs.samples))
            self.sampler.draw(logits, inputs, self._drawn[: len(rows)], self._logprobs[: len(rows)])
            flight = self._flight(rows, logits, inputs)
            flight.logits = logits
        else:
            flight = Flight([], next(self._replies), [])
        flight.residual, flight.first_rows = residual, first_rows
        return flight

    def _decode(self, size: int) -> None:
        """A decode step from inputs to tokens, all on the device: what a graph holds."""
        inputs = self._inputs[size]
        drawn = self._drawn.index_select(0, inputs.source.clamp(min=0))
        tokens = torch.where(inputs.source < 0, inputs.tokens, drawn)
        residual = self.model.residual(_batch(inputs, tokens, size, 0), self._cache)
        logits = self.model.logits(residual, out=self._logits[:size])
        self.sampler.draw(logits, inputs, self._drawn[:size], self._logprobs[:size])

    def _flight(self, rows: list[Row], logits: torch.Tensor, inputs: DeviceInputs) -> Flight:
        drawn, logprobs = self._drawn[: len(rows)], self._logprobs[: len(rows)]
        tops = self.sampler.draw_carefully(logits, rows, inputs, drawn, logprobs)
        reply = next(self._replies)
        reply.fetch(drawn, logprobs)
        return Flight(rows, reply, [row.sequence.blocks for row in rows], tops)


def _batch(inputs: DeviceInputs, tokens: torch.Tensor, decodes: int, most_queries: int) -> GpuBatch:
    return GpuBatch(
        tokens=tokens,
        positions=inputs.positions,
        slots=inputs.slots,
        tables=inputs.tables,
        lengths=inputs.lengths,
        starts=inputs.starts,
        decodes=decodes,
        most_queries=most_queries,
    )
