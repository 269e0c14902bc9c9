"""What a sequence with a `KvBudget` keeps in the KV cache, and when it lets go of the rest. Rules only.

How many tokens are gone after `computed` tokens is a function of that number alone (`evicted_at`), for both policies:
whole blocks, so many that at most the budget is left. It is applied at *cuts*. What a position attends to so depends on
the position and not on the load, nor on whether the sequence was preempted and is computed anew.

`window`: blocks behind the sinks (rounded up) leave the block table. Cuts are, in the prompt, multiples of
`chunk_tokens` and its end; behind it, every token. Between cuts chunks may end anywhere.

`importance`: the runner moves what stays to the front, and the last blocks are free. The first cut is the end of the
prompt: until then all of it stays, for what a prompt asks for often stands in its last line. What goes is what the
prompt's last queries (its observation window) attended to least. They are computed in one chunk; the chunks before it
may end anywhere. Behind the prompt every token is a cut, and adds to the sums by which the next ones go. Those that are
computed anew come one by one too, for sums of floats made in another order are others.

Both end at the model's context: their positions are those of the whole text.
"""

from __future__ import annotations

from meshlm.worker.engine.sequence import Sequence
from meshlm.worker.messages import KvBudget

OBSERVED = 32  # latest tokens, which `Runner.compact` never takes away; in a prompt their queries say what else stays


class Budgets:
    """The rules for one engine: blocks of `block_size` tokens, chunks of at most `chunk_tokens`."""

    def __init__(self, block_size: int, chunk_tokens: int) -> None:
        self._block = block_size
        self._chunk = chunk_tokens

    def possible(self, budget: KvBudget, total_blocks: int, prompt: int = 0) -> bool:
        """Whether the budget leaves room for what never goes, and what it holds of a prompt of so many tokens and of
        any answer fits into so many blocks."""
        fixed = self.sink_blocks(budget) * self._block if budget.policy == "window" else OBSERVED
        return budget.tokens >= fixed + self._block and self._blocks(self._most(budget, prompt)) <= total_blocks

    def sink_blocks(self, budget: KvBudget) -> int:
        return self._blocks(budget.sinks)

    def evicted_at(self, budget: KvBudget, computed: int) -> int:
        """Tokens that are gone where `computed` is a cut: a multiple of the block size."""
        return self._block * self._blocks(max(0, computed - budget.tokens))

    def is_cut(self, sequence: Sequence, budget: KvBudget, computed: int) -> bool:
        return computed >= sequence.prompt_length or (budget.policy == "window" and computed % self._chunk == 0)

    def next_cut(self, sequence: Sequence, budget: KvBudget) -> int:
        """Where the next chunk ends at the latest: at most `chunk_tokens` on, at a cut where tokens go."""
        start = sequence.computed
        multiple = start - start % self._chunk + self._chunk
        if start < sequence.prompt_length:
            return min(multiple, sequence.prompt_length)
        if budget.policy == "importance":
            return start + 1
        blocks = self._blocks(max(0, start - budget.tokens))  # that are gone, or go when one more token is computed
        return min(multiple, budget.tokens + blocks * self._block + 1)

    def observation(self, sequence: Sequence, budget: KvBudget) -> tuple[int, int]:
        """The positions that must not be cut apart, from where to where: at most `chunk_tokens`, maybe none."""
        end = sequence.prompt_length
        if budget.policy == "window":
            return end, end
        return max(0, end - min(OBSERVED, self._chunk)), end

    def chunk_end(self, sequence: Sequence, budget: KvBudget, wanted: int) -> int:
        """Where the next chunk ends that is to end at `wanted`: before its observation window where it would cut that
        apart, or behind it where it begins with it."""
        first, end = self.observation(sequence, budget)
        if not first < wanted < end:
            return wanted
        return first if sequence.computed < first else end

    def blocks_needed(self, sequence: Sequence, budget: KvBudget) -> int:
        """Blocks with which the sequence can compute all tokens it has."""
        prompt = sequence.prompt_length if sequence.computed < sequence.prompt_length else 0
        return self._blocks(min(len(sequence.tokens) - sequence.evicted, self._most(budget, prompt)))

    def _most(self, budget: KvBudget, prompt: int) -> int:
        """Tokens that the cache holds at most from now on, where so many of the prompt are yet held whole."""
        if budget.policy == "importance":
            return max(prompt, budget.tokens + 1)
        return budget.tokens + self._chunk

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)
