"""The verdict's words as a model's tokens: asked of the worker, for the guard has no tokenizer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence

from meshlm.guard.judging import JudgeError
from meshlm.guard.llama.decoding import Grammar, Tokens
from meshlm.v1 import worker_pb2

# Most continuations of one Score.
BATCH = 16

Continuation = worker_pb2.Continuation
Ask = Callable[[Sequence[Continuation]], Awaitable[Sequence[Tokens]]]


async def learn(codes: Sequence[str], ask: Ask) -> Grammar:
    """`ask` gives the tokens of continuations. Raises JudgeError for a model that cannot give such verdicts."""
    head, *others = codes
    texts = ["safe", "unsafe", *(f"unsafe\n{code}" for code in codes)]
    # As it follows another code, for a token may hold the comma too, and some tokenizers put a space before a text.
    pairs = [f"unsafe\n{head},{code}" for code in others] + ([f"unsafe\n{others[0]},{head}"] if others else [])
    asked = [Continuation(end_of_turn=True), *(Continuation(text=text) for text in (*texts, *pairs))]
    found = [tokens for batch in batches(asked) for tokens in await ask(batch)]
    end, safe, unsafe = found[:3]
    first = dict(zip(codes, found[3 : 3 + len(codes)], strict=True))
    # Where a tokenizer spells the space before a text by itself, both words begin with it.
    lead = next((at for at, (a, b) in enumerate(zip(safe, unsafe, strict=False)) if a != b), None)
    if lead is None:
        raise JudgeError("no token tells `safe` from `unsafe`")
    if any(unit[: lead + 1] != unsafe[: lead + 1] for unit in first.values()):
        raise JudgeError("`unsafe` begins with another token where categories follow")
    behind = dict(zip((*others, head), found[3 + len(codes) :], strict=False))
    more = {}
    for code, tokens in behind.items():
        before = first[head] if code != head else first[others[0]]
        if tokens[: len(before)] == before and len(tokens) > len(before):
            more[code] = tokens[len(before) :]
    return Grammar(safe[:lead], safe[lead], unsafe[lead], first, more, end[0])


def batches(items: Sequence[Continuation]) -> Iterator[Sequence[Continuation]]:
    """As many as one Score takes at a time."""
    return (items[at : at + BATCH] for at in range(0, len(items), BATCH))
