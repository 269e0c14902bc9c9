"""What the draw of a batch's next tokens is told of its rows, and the draw's definition in torch.

The order is vLLM's: bias and minimum length, penalties, temperature, min-p (arXiv:2407.01082), top-k, top-p
(arXiv:1904.09751); then by inverse distribution in the order of token ids, with one uniform number a row, so that a CPU
and a GPU draw the same token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meshlm.kernels.native.structures import NO_TOKEN as NO_TOKEN

COLDEST = 1e-5  # a lower temperature draws the same token, and would divide logits to infinity
SEEN_IN_PROMPT = 1  # of an entry of `counts`; the rest is OUTPUT times the tokens that were drawn
OUTPUT = 2


@dataclass(frozen=True, slots=True)
class SampleRows:
    """How each row of a batch is drawn: tensors of one entry a row, on the device of the logits.

    temperature: float32, 0 is greedy; top_k: int32, 0 keeps all; top_p: float32 in (0, 1]; min_p: float32 in [0, 1];
    uniform: float64 in [0, 1).
    repetition (1 is none), presence, frequency (0 is none): float32 penalties. They need `slots`, int32, the row of
    `counts` that tells what the sequence has said; below 0 a row is not penalized.
    bias_ids: (rows, n) int32, a row's ids distinct, -1 where there are fewer; bias_values: (rows, n) float32, added to
    the logits of these ids. -inf forbids a token.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor
    repetition: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    frequency: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    bias_ids: torch.Tensor | None = None
    bias_values: torch.Tensor | None = None


def reference_probabilities(logits: torch.Tensor, rows: SampleRows, counts: torch.Tensor | None = None) -> torch.Tensor:
    """What each token is drawn with: (rows, vocab) float64. A greedy row has one 1, one that is no distribution zeros.

    logits: (rows, vocab) of a float type; counts: (slots, vocab) int32. Filters compare float32, as every
    implementation does, so that equals are equal; sums are float64 over a sorted row.
    """
    out = torch.zeros(logits.shape, dtype=torch.float64)
    for row in range(len(logits)):
        x = _adjusted(logits[row].float().cpu(), rows, row, counts)
        temperature = float(rows.temperature[row])
        if bool(logits[row].isnan().any()) or bool(x.isneginf().all()):
            continue
        x = torch.where(x.isnan(), -torch.inf, x)
        if temperature <= 0:
            out[row, int((x == x.max()).nonzero()[0])] = 1
            continue
        x = (x / torch.tensor(max(temperature, COLDEST))).clamp(max=torch.finfo(torch.float32).max)
        out[row] = torch.softmax(_filtered(x, rows, row).double(), 0)
    return out


def _adjusted(x: torch.Tensor, rows: SampleRows, row: int, counts: torch.Tensor | None) -> torch.Tensor:
    """Bias, then penalties, of one row (vocab,)."""
    x = x.clone()
    if rows.bias_ids is not None and rows.bias_values is not None:
        for token, value in zip(rows.bias_ids[row].tolist(), rows.bias_values[row].tolist(), strict=True):
            if token >= 0:
                x[token] += value
    slot = -1 if rows.slots is None else int(rows.slots[row])
    if counts is None or slot < 0:
        return x
    said = counts[slot].cpu()
    output = said // OUTPUT
    if rows.repetition is not None:
        penalty = rows.repetition[row].cpu()
        x = torch.where(said > 0, torch.where(x > 0, x / penalty, x * penalty), x)
    if rows.frequency is not None:
        x = x - rows.frequency[row].cpu() * output
    if rows.presence is not None:
        x = x - rows.presence[row].cpu() * (output > 0)
    return x


def _filtered(x: torch.Tensor, rows: SampleRows, row: int) -> torch.Tensor:
    """min-p, top-k and top-p by a sort, of one row (vocab,): tokens that are out become -inf."""
    top_k, top_p, min_p = int(rows.top_k[row]), float(rows.top_p[row]), rows.min_p[row].cpu()
    if min_p > 0:
        x = torch.where(x < x.max() + min_p.log(), -torch.inf, x)
    if 0 < top_k < len(x):
        x = torch.where(x < x.sort(descending=True).values[top_k - 1], -torch.inf, x)
    if top_p < 1:
        values = x.sort(descending=True).values
        share = torch.softmax(values.double(), 0)
        before = share.cumsum(0) - share
        inside = (before < top_p) & ~values.isneginf()
        inside[0] = True
        x = torch.where(x < values[inside].min(), -torch.inf, x)
    return x


def reference_sample(
    logits: torch.Tensor, rows: SampleRows, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, (rows,) int32, and their log-probabilities in the model's own distribution, (rows,) float32; NO_TOKEN
    and NaN of a row that is no distribution."""
    cumulative = reference_probabilities(logits, rows, counts).cumsum(-1)
    broken = cumulative[:, -1:] == 0
    target = rows.uniform.cpu().unsqueeze(1) * cumulative[:, -1:]
    # right=True passes over tokens of zero probability, whose cumulative value equals their neighbour's.
    tokens = torch.where(broken, 0, torch.searchsorted(cumulative, target, right=True))
    logprobs = torch.log_softmax(logits.double().cpu(), -1).gather(1, tokens).masked_fill(broken, torch.nan).squeeze(1)
    tokens = torch.where(broken, NO_TOKEN, tokens)
    return tokens.squeeze(1).int().to(logits.device), logprobs.float().to(logits.device)


def reference_count_tokens(
    counts: torch.Tensor, slots: torch.Tensor, tokens: torch.Tensor, *, prompt: bool = False
) -> None:
    """Notes in `counts` (slots, vocab) int32, in place, that the sequence of slots[i] has said tokens[i], or was asked
    it. A slot or token below 0 is of no sequence."""
    for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
        if slot >= 0 and token >= 0:
            counts[slot, token] = counts[slot, token] | SEEN_IN_PROMPT if prompt else counts[slot, token] + OUTPUT
