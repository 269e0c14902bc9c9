"""What a sequence with a `KvBudget` keeps in the KV cache, and when it lets go of the rest. Rules only.

How many tokens are gone after `computed` tokens is a function of that number alone (`evicted_at`), for both policies:
whole blocks, so many that at most the budget is left. It is applied at *cuts*: while the prompt is computed, at
multiples of `chunk_tokens` and at its end; behind it, after every token. What a position attends to so depends on the
position and not on the load, nor on whether the sequence was preempted and is computed anew: then its output is
computed in chunks that end where the next block goes.

`window`: blocks behind the sinks (rounded up) leave the block table. Between cuts such a prompt may be computed
in chunks of any size. `importance`: the runner moves what stays to the front, and the last blocks are free; its choice
goes by the last queries of a chunk, so chunks end at cuts and nowhere else.

Both end at the model's context: their positions are those of the whole text.
"""

from __future__ import annotations

from meshlm.worker.engine.sequence import Sequence
from meshlm.worker.messages import KvBudget

OBSERVED = 32  # latest tokens that `Runner.compact` never takes away


class Budgets:
    """The rules for one engine: blocks of `block_size` tokens, prompts cut at multiples of `chunk_tokens`."""

    def __init__(self, block_size: int, chunk_tokens: int) -> None:
        self._block = block_size
        self._chunk = chunk_tokens

    def possible(self, budget: KvBudget, total_blocks: int) -> bool:
        """Whether the budget leaves room for what never goes, and fits, with a chunk, into so many blocks."""
        fixed = self.sink_blocks(budget) * self._block if budget.policy == "window" else OBSERVED
        return budget.tokens >= fixed + self._block and self._blocks(budget.tokens + self._chunk) <= total_blocks

    def sink_blocks(self, budget: KvBudget) -> int:
        return self._blocks(budget.sinks)

    def evicted_at(self, budget: KvBudget, computed: int) -> int:
        """Tokens that are gone where `computed` is a cut: a multiple of the block size."""
        return self._block * self._blocks(max(0, computed - budget.tokens))

    def is_cut(self, sequence: Sequence, computed: int) -> bool:
        return computed >= sequence.prompt_length or computed % self._chunk == 0

    def next_cut(self, sequence: Sequence, budget: KvBudget) -> int:
        """Where the next chunk ends at the latest: in the prompt at a cut, behind it where the next block goes."""
        start = sequence.computed
        multiple = start - start % self._chunk + self._chunk
        if start < sequence.prompt_length:
            return min(multiple, sequence.prompt_length)
        blocks = self._blocks(max(0, start - budget.tokens))  # that are gone, or go when one more token is computed
        return min(multiple, budget.tokens + blocks * self._block + 1)

    def blocks_needed(self, sequence: Sequence, budget: KvBudget) -> int:
        """Blocks with which the sequence can compute all tokens it has."""
        return self._blocks(min(len(sequence.tokens) - sequence.evicted, budget.tokens + self._chunk))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)
