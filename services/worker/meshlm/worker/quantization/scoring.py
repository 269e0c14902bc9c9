"""A model in float32 whose matrices can be exchanged, and how far it is then from what it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from meshlm.kernels.kv_cache import allocate_kv_cache
from meshlm.kernels.paged_attention import plan_decode
from meshlm.kernels.prefill_attention import padded_blocks
from meshlm.worker.loading.checkpoint import Checkpoint
from meshlm.worker.models.batch import Batch, PrefillSpan
from meshlm.worker.models.dense_weights import DenseWeights
from meshlm.worker.models.registry import load_decoder
from meshlm.worker.models.torch_decoder import TorchDecoder

_CPU = torch.device("cpu")
_BLOCK = 16  # tokens of a cache block
_ROWS = 128  # logits at a time: a vocabulary's worth each


@dataclass(frozen=True, slots=True)
class _NamedWeights:
    """Dense weights that remembers its matrices; a `TorchDecoder` makes them views of what it multiplies with."""

    dense: DenseWeights
    matrices: dict[str, torch.Tensor] = field(default_factory=dict)

    def matrix(self, name: str, rows: int, cols: int) -> torch.Tensor:
        self.matrices[name] = self.dense.matrix(name, rows, cols)
        return self.matrices[name]

    def vector(self, name: str, *shape: int) -> torch.Tensor:
        return self.dense.vector(name, *shape)

    def has(self, name: str) -> bool:
        return self.dense.has(name)


class ScoredModel:
    """A checkpoint as `TorchDecoder` in float32 on the CPU, with its matrices by name: write into them to exchange."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises ModelFileError."""
        weights = _NamedWeights(DenseWeights(checkpoint, _CPU, torch.float32))
        self.checkpoint = checkpoint
        self.decoder = TorchDecoder(load_decoder(checkpoint, weights, lambda done, total: None))
        self.matrices = weights.matrices
        self._cache = torch.empty(0)

    @property
    def head(self) -> torch.Tensor:
        """(vocab, width), tied or not."""
        tied = self.checkpoint.config.tied_head
        return self.matrices["model.embed_tokens.weight" if tied else "lm_head.weight"]

    @torch.inference_mode()
    def hidden(self, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The final hidden states, which the head reads, of positions [start, tokens) of one text: (positions, width).

        tokens: (tokens,) int64. Those before `start` must have been computed by the call before.
        """
        count, end, config = len(tokens) - start, len(tokens), self.decoder.config
        blocks = padded_blocks(list(range(-(-end // _BLOCK))), end, _BLOCK)
        self._reserve(len(blocks))
        positions = torch.arange(start, end)
        no_rows: Any = plan_decode([], [], _BLOCK, config.kv_heads, torch.float32, _CPU)
        batch = Batch(
            tokens=tokens[start:],
            positions=positions,
            slots=positions,
            rows=torch.arange(count),
            decode=no_rows,
            prefill=(PrefillSpan(0, count, start, torch.tensor(blocks)),),
            windowed=dict.fromkeys(self.decoder.windows, no_rows),
        )
        return self.decoder.normed(self.decoder.residual(batch, self._cache))

    def _reserve(self, blocks: int) -> None:
        """A larger cache keeps what the smaller one held."""
        had = self._cache.shape[3] if self._cache.ndim > 1 else 0
        if had < blocks:
            config = self.decoder.config
            size = max(blocks, 2 * had)
            cache = allocate_kv_cache(
                config.layers, config.kv_heads, size, _BLOCK, config.head_dim, torch.float32, _CPU
            )
            if had:
                cache[:, :, :, :had] = self._cache
            self._cache = cache

    @torch.inference_mode()
    def generate(self, prompt: torch.Tensor, count: int) -> torch.Tensor:
        """`prompt` and `count` tokens behind it, the likeliest each: int64."""
        tokens, start = prompt, 0
        for _ in range(count):
            last = self.hidden(tokens, start)[-1:]
            start = len(tokens)
            tokens = torch.cat((tokens, functional.linear(last, self.head).argmax(-1)))
        return tokens

    def restore(self, names: Sequence[str]) -> None:
        """These matrices as the file has them."""
        for name in names:
            self.matrices[name].copy_(self.checkpoint.tensor(name, *self.matrices[name].shape))

    @contextmanager
    def observed(self) -> Iterator[dict[str, torch.Tensor]]:
        """Sums, by a matrix's name, of the squares of the inputs that it multiplies: (cols,) each, as they grow."""
        names: dict[int, list[str]] = {}
        for name, matrix in self.matrices.items():  # fused matrices share a storage, and their input
            names.setdefault(matrix.untyped_storage().data_ptr(), []).append(name)
        with _Observer(names) as observer:
            yield observer.squares


class _Observer(TorchFunctionMode):
    """Sees every product with a matrix of which the storage's address is in `names`."""

    def __init__(self, names: dict[int, list[str]]) -> None:
        super().__init__()
        self._names = names
        self.squares: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            x, weight = args[0], args[1]
            for name in self._names.get(weight.untyped_storage().data_ptr(), ()):
                self.squares[name] = self.squares.get(name, 0) + x.float().square().sum(0)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Reference:
    """What texts are compared with: the exact model's hidden states and head. All the logits would take gigabytes."""

    texts: tuple[torch.Tensor, ...]  # (tokens,) int64 each
    hidden: tuple[torch.Tensor, ...]  # (tokens, width) each
    head: torch.Tensor


def reference(model: ScoredModel, texts: Sequence[torch.Tensor]) -> Reference:
    return Reference(tuple(texts), tuple(model.hidden(text) for text in texts), model.head.clone())


@dataclass(frozen=True, slots=True)
class Quality:
    """How a model does on a text, beside its reference. Nats a token; the first token of a text is not scored."""

    tokens: int
    loss: float
    reference_loss: float
    kl: float  # of the distributions, from the reference's to this one's
    agreement: float  # share of tokens at which both would draw the same one, greedily

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def rise(self) -> float:
        """Of the perplexity over the reference's: 0.01 is 1%."""
        return math.exp(self.loss - self.reference_loss) - 1


@torch.inference_mode()
def compare(model: ScoredModel, exact: Reference) -> Quality:
    """The model as its matrices are now, on the reference's texts."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for text, exact_hidden in zip(exact.texts, exact.hidden, strict=True):
        hidden = model.hidden(text)
        for start in range(0, len(text) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(text) - 1))
            ours = functional.linear(hidden[rows], model.head)
            theirs = functional.linear(exact_hidden[rows], exact.head)
            sums += compare_logits(ours, theirs, text[rows.start + 1 : rows.stop + 1])
        count += len(text) - 1
    loss, exact_loss, kl, agreed = (sums / count).tolist()
    return Quality(count, loss, exact_loss, kl, agreed)


def compare_logits(ours: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over rows: our loss, their loss, the divergence of ours from theirs, and how often the largest agree.

    ours, theirs: (rows, vocab); targets: (rows,) int64, the token that follows. Returns (4,) float64.
    """
    ours, theirs = torch.log_softmax(ours, -1), torch.log_softmax(theirs, -1)
    index = targets.unsqueeze(1)
    agreed = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    divergence = functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    parts = (-ours.gather(1, index).sum(), -theirs.gather(1, index).sum(), divergence, agreed)
    return torch.stack([part.double() for part in parts])


@torch.inference_mode()
def matched(model: ScoredModel, generated: torch.Tensor, prompt: int) -> int:
    """How many tokens this model, greedy, writes like `generated` behind its first `prompt` tokens, before another one.

    Up to the first difference both have the same text before them, so one pass over it tells.
    """
    hidden = model.hidden(generated[:-1])[prompt - 1 :]
    same = functional.linear(hidden, model.head).argmax(-1) == generated[prompt:]
    return int(same.long().cumprod(0).sum())
