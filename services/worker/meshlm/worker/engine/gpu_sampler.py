"""Draws on a GPU: plain ones as part of a step, and those with bias, penalties or a report after it."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch

from meshlm.kernels.gpu.sample import count_tokens, sample
from meshlm.kernels.sample import SampleRows
from meshlm.worker.engine.flight import Row
from meshlm.worker.engine.gpu_inputs import DeviceInputs
from meshlm.worker.engine.sequence import Sequence
from meshlm.worker.messages import TokenLogprob

# What lists of tokens are padded to: a kernel is compiled for each width of bias, and anew for numbers that 16 does not
# divide. A request may have 1,024 biased tokens, and its stop tokens.
BIAS_WIDTHS = (16, 64, 256, 1024, 2048)
_PAIRS = 16


class GpuSampler:
    """Draws the next token of each row. Keeps what penalized sequences have said in `counts`, until `forget`."""

    def __init__(self, max_running: int, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._counts = torch.zeros(max_running, vocab_size, dtype=torch.int32, device=device)
        self._free = list(range(max_running))
        self._slots: dict[int, int] = {}  # of penalized sequences, by id()
        self._counted: dict[int, int] = {}  # how many of their tokens

    def is_careful(self, sequence: Sequence, output_index: int) -> bool:
        """Whether this token of a sequence is drawn in a way that a plain draw does not know."""
        sampling = sequence.request.sampling
        return bool(
            sampling.logprobs or sampling.logit_bias or _penalized(sequence) or _too_short(sequence, output_index)
        )

    def draw(self, logits: torch.Tensor, inputs: DeviceInputs, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Plain draws of all rows, (rows, vocab), into tokens (rows,) int32 and logprobs (rows,) float32."""
        sample(logits, _plain(inputs, len(logits)), out=(tokens, logprobs))

    def draw_carefully(
        self,
        logits: torch.Tensor,
        rows: list[Row],
        inputs: DeviceInputs,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
    ) -> dict[int, tuple[TokenLogprob, ...]]:
        """Draws all rows again where one is careful. Returns the likeliest tokens of those that ask for some.

        Counts and biases are given whether a row needs them or not: else there were more kernels to compile.
        """
        if not any(self.is_careful(row.sequence, row.output_index) for row in rows):
            return {}
        plain = _plain(inputs, len(rows))
        samplings = [row.sequence.request.sampling for row in rows]
        ids, values = self._bias(rows)
        sample(
            logits,
            SampleRows(
                temperature=plain.temperature,
                top_k=plain.top_k,
                top_p=plain.top_p,
                min_p=plain.min_p,
                uniform=plain.uniform,
                repetition=self._floats([sampling.repetition_penalty for sampling in samplings]),
                presence=self._floats([sampling.presence_penalty for sampling in samplings]),
                frequency=self._floats([sampling.frequency_penalty for sampling in samplings]),
                slots=self._catch_up(rows),
                bias_ids=ids,
                bias_values=values,
            ),
            counts=self._counts,
            out=(tokens, logprobs),
        )
        return _tops(logits, [sampling.logprobs or 0 for sampling in samplings])

    def forget(self, sequence: Sequence) -> None:
        slot = self._slots.pop(id(sequence), None)
        if slot is not None:
            del self._counted[id(sequence)]
            self._free.append(slot)

    def _catch_up(self, rows: list[Row]) -> torch.Tensor:
        """Counts what penalized sequences have said since. Returns (rows,) int32: their slots, -1 for the others."""
        slots = [-1] * len(rows)
        prompt: list[tuple[int, int]] = []  # (slot, token)
        output: list[tuple[int, int]] = []
        counted: dict[int, int] = {}
        for number, row in enumerate(rows):
            sequence = row.sequence
            if not _penalized(sequence):
                continue
            slot = self._slots.get(id(sequence))
            if slot is None:
                slot = self._slots[id(sequence)] = self._free.pop()
                self._counted[id(sequence)] = 0
                self._counts[slot].zero_()
            start, length = self._counted[id(sequence)], sequence.prompt_length
            prompt += [(slot, token) for token in sequence.tokens[start:length]]
            output += [(slot, token) for token in sequence.tokens[max(start, length) :]]
            counted[id(sequence)] = len(sequence.tokens)
            slots[number] = slot
        for said, in_prompt in ((prompt, True), (output, False)):
            if said:
                pairs = self._integers(said + [(-1, -1)] * (-len(said) % _PAIRS))  # no slot of that number: passed over
                count_tokens(self._counts, pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), prompt=in_prompt)
        self._counted |= counted  # not before: where memory gives out above, the step is run again
        return self._integers(slots)

    def _bias(self, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias, and what a minimum length forbids: (rows, width) ids, -1 where there are fewer, and values."""
        biases: list[dict[int, float]] = []
        for row in rows:
            request = row.sequence.request
            bias = dict(request.sampling.logit_bias or {})
            if _too_short(row.sequence, row.output_index):
                bias |= dict.fromkeys(request.limits.stop_token_ids, float("-inf"))
            biases.append(bias)
        most = max(map(len, biases))
        width = next((width for width in BIAS_WIDTHS if width >= most), most)
        ids = [[*bias, *[-1] * (width - len(bias))] for bias in biases]
        values = [[*bias.values(), *[0.0] * (width - len(bias))] for bias in biases]
        return self._integers(ids), torch.tensor(values, dtype=torch.float32, device=self._device)

    def _integers(self, values: Items[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

    def _floats(self, values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _plain(inputs: DeviceInputs, count: int) -> SampleRows:
    return SampleRows(
        temperature=inputs.temperature[:count],
        top_k=inputs.top_k[:count],
        top_p=inputs.top_p[:count],
        min_p=inputs.min_p[:count],
        uniform=inputs.uniform[:count],
    )


def _penalized(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return sampling.repetition_penalty != 1.0 or bool(sampling.presence_penalty or sampling.frequency_penalty)


def _too_short(sequence: Sequence, output_index: int) -> bool:
    limits = sequence.request.limits
    return bool(limits.stop_token_ids) and output_index < limits.min_tokens


def _tops(logits: torch.Tensor, counts: list[int]) -> dict[int, tuple[TokenLogprob, ...]]:
    """The likeliest tokens of the model's own distribution, by row, as many as each asks for."""
    asking = [row for row, count in enumerate(counts) if count]
    if not asking:
        return {}
    values, ids = torch.log_softmax(logits[asking].float(), -1).topk(max(counts))
    return {
        row: tuple(TokenLogprob(token, value) for token, value in zip(found, of, strict=True))[: counts[row]]
        for row, found, of in zip(asking, ids.tolist(), values.tolist(), strict=True)
    }
