"""From logits to tokens: masks, penalties, temperature, filters, the draw, and log-probabilities.

The order is vLLM's: minimum length and bias, penalties, temperature, min-p, top-k, top-p. The draw is by inverse
distribution with one uniform number that depends on (seed, output index) alone, so a token depends neither on the
rest of the batch nor on preemption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from meshlm.kernels.native.structures import NO_TOKEN
from meshlm.worker.engine.draws import penalized, told, uniform
from meshlm.worker.engine.sequence import NonFinite, Sampled, Sequence
from meshlm.worker.messages import Sampling, TokenLogprob

_CANDIDATES = 256  # top-p looks at this many tokens before it sorts the whole vocabulary
_COLDEST = 1e-5  # a lower temperature draws the same token, and would divide logits to infinity


@dataclass(slots=True)
class _Counts:
    """What a sequence has said so far: `seen` (vocab,) bool of prompt and output, `output` (vocab,) float32 counts."""

    seen: torch.Tensor
    output: torch.Tensor
    length: int = 0

    def catch_up(self, sequence: Sequence) -> None:
        # May be empty: a step that ran out of memory after its penalties is tried again.
        fresh = torch.tensor(sequence.tokens[self.length :], dtype=torch.int64, device=self.seen.device)
        self.seen[fresh] = True
        answered = fresh[max(0, sequence.prompt_length - self.length) :]
        self.output.index_add_(0, answered, torch.ones_like(answered, dtype=torch.float32))
        self.length = len(sequence.tokens)


class Sampler:
    """Draws the next token of each row. Keeps penalty counts by sequence until `forget`."""

    def __init__(self) -> None:
        self._counts: dict[int, _Counts] = {}

    def forget(self, sequence: Sequence) -> None:
        self._counts.pop(id(sequence), None)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled | NonFinite]:
        """logits: (len(sequences), vocab) float32, overwritten. Entry i is the next token of sequences[i]."""
        reports = self.prepare(logits, sequences)
        highest = logits.amax(-1)  # of a row with what is no number, no number
        broken = (highest.isnan() | highest.isneginf()).tolist()
        if any(broken):  # a draw of nonsense would be a token that there is not
            logits[torch.tensor(broken, device=logits.device)] = 0.0
        drawn = [row for row, sequence in enumerate(sequences) if sequence.request.sampling.temperature > 0]
        tokens = logits.argmax(-1).tolist() if len(drawn) < len(sequences) else [0] * len(sequences)
        if drawn:
            part = logits if len(drawn) == len(sequences) else logits[drawn]
            for row, token in zip(drawn, _draw(part, [sequences[row] for row in drawn]), strict=True):
                tokens[row] = token
        tokens = [NO_TOKEN if wrong else token for token, wrong in zip(tokens, broken, strict=True)]
        return told(tokens, reports)

    @torch.inference_mode()
    def prepare(self, logits: torch.Tensor, sequences: list[Sequence]) -> dict[int, Report]:
        """What comes before temperature and draw: bias, penalties and minimum length, in place on (rows, vocab) logits;
        and by row the log-probabilities of the model's own distribution, where a request wants them."""
        reports = {
            row: Report(logits[row], sequence.request.sampling.logprobs)
            for row, sequence in enumerate(sequences)
            if sequence.request.sampling.logprobs is not None
        }
        for row, sequence in enumerate(sequences):
            self._adjust(logits[row], sequence)
        return reports

    def _adjust(self, row: torch.Tensor, sequence: Sequence) -> None:
        """Minimum length, bias and penalties, in place on one row (vocab,)."""
        sampling, limits = sequence.request.sampling, sequence.request.limits
        if sequence.output_length < limits.min_tokens and limits.stop_token_ids:
            row[list(limits.stop_token_ids)] = -torch.inf
        if sampling.logit_bias:
            row[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()), device=row.device)
        if not penalized(sampling):
            return
        counts = self._counts.get(id(sequence))
        if counts is None:
            counts = _Counts(torch.zeros_like(row, dtype=torch.bool), torch.zeros_like(row))
            self._counts[id(sequence)] = counts
        counts.catch_up(sequence)
        if sampling.repetition_penalty != 1.0:
            scaled = torch.where(row > 0, row / sampling.repetition_penalty, row * sampling.repetition_penalty)
            row.copy_(torch.where(counts.seen, scaled, row))
        row.sub_(counts.output, alpha=sampling.frequency_penalty)
        row.sub_(counts.output.clamp(max=1), alpha=sampling.presence_penalty)


class Report:
    """Log-probabilities of one row as the model gave them, kept before the row is overwritten."""

    def __init__(self, row: torch.Tensor, count: int | None) -> None:
        self._logprobs = torch.log_softmax(row, -1)
        self._count = count or 0

    def sampled(self, token: int) -> Sampled:
        values, ids = self._logprobs.topk(self._count)
        top = tuple(TokenLogprob(int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
        return Sampled(token, float(self._logprobs[token]), top)


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    """logits: (rows, vocab), overwritten. One token a row, by inverse distribution in the order of token ids."""
    samplings = [sequence.request.sampling for sequence in sequences]
    logits /= _column([max(sampling.temperature, _COLDEST) for sampling in samplings], logits)
    logits.clamp_(max=torch.finfo(logits.dtype).max)  # a tiny repetition penalty: infinity less infinity is no number
    filter_logits(logits, samplings)
    cumulative = torch.softmax(logits, -1).cumsum(-1, dtype=torch.float64)
    numbers = [uniform(s.request.sampling.seed, s.output_length) for s in sequences]
    target = torch.tensor(numbers, dtype=torch.float64, device=logits.device).unsqueeze(1) * cumulative[:, -1:]
    # right=True passes over tokens of zero probability, whose cumulative value equals their neighbour's.
    tokens: list[int] = torch.searchsorted(cumulative, target, right=True).squeeze(1).tolist()
    return tokens


def filter_logits(logits: torch.Tensor, samplings: list[Sampling]) -> None:
    """min-p (arXiv:2407.01082), top-k, then top-p (arXiv:1904.09751), in place: tokens that are out become -inf.

    logits: (rows, vocab), temperature already applied. Each filter is a threshold on a row's logits; tokens that
    equal the threshold stay in, and the most likely one always does.
    """
    if any(sampling.min_p for sampling in samplings):
        floors = [math.log(sampling.min_p) if sampling.min_p else -math.inf for sampling in samplings]
        logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + _column(floors, logits), -torch.inf)
    vocab = logits.shape[1]
    ks = [min(sampling.top_k or vocab, vocab) for sampling in samplings]
    limited = [row for row, k in enumerate(ks) if k < vocab]
    if limited:
        widest = max(ks[row] for row in limited)
        values = logits[limited].topk(widest).values
        floor = values.gather(1, torch.tensor([[ks[row] - 1] for row in limited], device=logits.device))
        logits[limited] = logits[limited].masked_fill(logits[limited] < floor, -torch.inf)
    nucleus = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    if nucleus:
        part = logits[nucleus]
        floor = _top_p_floor(part, _column([samplings[row].top_p for row in nucleus], logits))
        logits[nucleus] = part.masked_fill(part < floor, -torch.inf)


def _top_p_floor(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit of the smallest set of tokens whose probability reaches `top_p`: (rows, 1)."""
    total = torch.logsumexp(logits, -1, keepdim=True)
    count = min(_CANDIDATES, logits.shape[1])
    while True:
        values = logits.topk(count).values
        share = (values - total).exp_()
        cumulative = share.cumsum(-1)
        if count == logits.shape[1] or bool((cumulative[:, -1:] >= top_p).all()):
            break
        count = logits.shape[1]
    outside = (cumulative - share >= top_p) | values.isneginf()
    outside[:, 0] = False
    return values.masked_fill(outside, torch.inf).amin(-1, keepdim=True)


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
