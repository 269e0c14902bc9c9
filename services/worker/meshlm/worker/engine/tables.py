"""Which blocks does a sequence hold, and which may it share? Block tables, from the start of a sequence to its end."""

from __future__ import annotations

from meshlm.worker.engine.blocks import BlockPool, extend_chain
from meshlm.worker.engine.budgets import Budgets
from meshlm.worker.engine.chunking import generates
from meshlm.worker.engine.sequence import Sequence
from meshlm.worker.engine.underway import Underway
from meshlm.worker.messages import KvBudget, ModelFacts


class Tables:
    """Fills and empties `Sequence.blocks`."""

    def __init__(self, facts: ModelFacts, budgets: Budgets) -> None:
        self.pool = BlockPool(facts.total_blocks)
        self._facts = facts
        self._size = facts.block_size
        self._budgets = budgets
        self._underway = Underway()
        self._compactions: list[tuple[Sequence, int]] = []

    def longest(self, sequence: Sequence) -> int:
        """Most tokens, prompt and answer, of one that is `possible`."""
        if sequence.request.kv is not None:
            return self._facts.max_context
        return min(self._facts.max_context, self.pool.total * self._size)

    def possible(self, sequence: Sequence) -> bool:
        """Whether `sequence` fits alone, with a token to draw if it draws any."""
        budget = sequence.request.kv
        if budget is not None:
            prompt = sequence.prompt_length
            if not (self._facts.kv_budgets and self._budgets.possible(budget, self.pool.total, prompt)):
                return False
        return len(sequence.tokens) + generates(sequence) <= self.longest(sequence)

    def ready(self, sequence: Sequence) -> bool:
        """Whether no other sequence is computing what this one would have to compute next."""
        if not self._underway:
            return True
        if self._underway.still_awaited(sequence):
            return False
        usable = self._usable_hashes(sequence)
        return not self._underway.put_off(sequence, usable, self.pool.known(usable))

    def open(self, sequence: Sequence) -> bool:
        """Blocks for all tokens that `sequence` has, or as many as its budget needs; cached ones count as computed.
        False where too few are free."""
        table = self.pool.acquire(self._usable_hashes(sequence), self._blocks_needed(sequence))
        if table is None:
            return False
        sequence.blocks, cached = table
        sequence.computed = cached * self._size
        if sequence.request.kv is None:
            self._underway.claim(sequence, sequence.hashes[cached : len(sequence.tokens) // self._size])
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Sees to a block for the last token, and where the runner looks ahead and one is free, for the next as well.
        False where none is free for the last token."""
        known = len(sequence.tokens) - sequence.evicted
        if not self._cover(sequence, known):
            return False
        if self._facts.looks_ahead and len(sequence.tokens) < self.longest(sequence):
            self._cover(sequence, known + 1)
        return True

    def _cover(self, sequence: Sequence, tokens: int) -> bool:
        """Takes a block where those of `sequence` hold no more than `tokens - 1`. False where none is free."""
        if len(sequence.blocks) * self._size >= tokens:
            return True
        fresh = self.pool.acquire([], 1)
        if fresh is None:
            return False
        sequence.blocks += fresh[0]
        return True

    def advance(self, sequence: Sequence, computed: int) -> None:
        """The first `computed` tokens are computed: their full blocks become findable."""
        first, end = sequence.computed // self._size, computed // self._size
        sequence.computed = computed
        if end > first and sequence.request.kv is None:
            extend_chain(sequence.hashes, sequence.tokens, end, self._size, sequence.request.cache_salt)
            for i in range(first, end):
                self.pool.publish(sequence.blocks[i], sequence.hashes[i], sequence.blocks[i - 1] if i else None)
                self._underway.computed(sequence.hashes[i])

    def distrust(self, sequence: Sequence) -> None:
        """What was computed for `sequence` is broken: nobody is to find it."""
        self.pool.retract(sequence.blocks)

    def keep_budget(self, sequence: Sequence, budget: KvBudget) -> None:
        """Lets go of what the last chunk or token brought over the budget, or asks for its compaction."""
        if not self._budgets.is_cut(sequence, budget, sequence.computed):
            return
        evicted = self._budgets.evicted_at(budget, sequence.computed)
        if evicted == sequence.evicted:
            return
        if budget.policy == "importance":
            self._compactions.append((sequence, sequence.computed - evicted))
            return
        first = self._budgets.sink_blocks(budget)
        end = first + (evicted - sequence.evicted) // self._size
        sequence.blocks = sequence.blocks[:first] + sequence.blocks[end:] + sequence.blocks[first:end]
        self._shrink(sequence, evicted)

    def take_compactions(self) -> list[tuple[Sequence, int]]:
        """Sequences over their budget, and how many of its cached tokens each is to keep."""
        compactions, self._compactions = self._compactions, []
        return compactions

    def compacted(self, sequence: Sequence, keep: int) -> None:
        """What `sequence` keeps lies in front."""
        self._shrink(sequence, sequence.computed - keep)

    def close(self, sequence: Sequence) -> None:
        """Gives up whatever `sequence` holds or waits for."""
        self._underway.drop(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.evicted = 0

    def _shrink(self, sequence: Sequence, evicted: int) -> None:
        """The cache holds all but `evicted` tokens; blocks that are not needed any more go back."""
        sequence.evicted = evicted
        needed = self._blocks_needed(sequence)
        self.pool.release(sequence.blocks[needed:])
        del sequence.blocks[needed:]

    def _usable_hashes(self, sequence: Sequence) -> list[bytes]:
        """The prefix hashes under which `sequence` may take up computed blocks."""
        request, known, size = sequence.request, len(sequence.tokens), self._size
        if request.kv is not None:
            return []
        extend_chain(sequence.hashes, sequence.tokens, known // size, size, request.cache_salt)
        if request.pool == "mean":
            return []
        # The last token is always computed, for what comes next; of a text to score, all from the one before the first.
        last = known - 1 if request.score_from is None else min(known, request.score_from) - 1
        return sequence.hashes[: last // size]

    def _blocks_needed(self, sequence: Sequence) -> int:
        budget = sequence.request.kv
        if budget is not None:
            return self._budgets.blocks_needed(sequence, budget)
        return -(-len(sequence.tokens) // self._size)
