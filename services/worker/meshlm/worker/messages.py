"""What the front process and the engine process say to each other: msgspec structs over a local socket.

The front sends `Submit`, `Cancel` and `Stop`; the engine answers with `Loading`, `Ready`, `StepReport` and `Goodbye`.
No torch here: the front imports this file.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is drawn. Defaults are the neutral values: no filter, no penalty, greedy off."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # [0, 1]
    repetition_penalty: float = 1.0  # > 0; 1 is off; prompt and output tokens count
    presence_penalty: float = 0.0  # [-2, 2]; output tokens count
    frequency_penalty: float = 0.0  # [-2, 2]; output tokens count
    seed: int = 0  # always set: the front draws one where the caller gave none
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)  # token id to added logit, [-100, 100]
    logprobs: int | None = None  # None: none; k: the chosen token's and the k most likely (0 to 20)


class Limits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a sequence ends."""

    max_tokens: int
    min_tokens: int = 0  # until then, stop tokens are not drawn
    stop_token_ids: frozenset[int] = frozenset()  # end-of-sequence ids included, unless the caller ignores them
    deadline: float | None = None  # seconds, `time.monotonic` of this machine


class KvBudget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sequence that keeps at most `tokens` in the KV cache, however long it grows.

    window: the first `sinks` tokens and the latest ones stay, positions re-based (StreamingLLM, arXiv:2309.17453).
    Holds at most `tokens` and one chunk more, from the start.
    importance: tokens that were attended to most stay, for each head its own (SnapKV, arXiv:2404.14469, when the prompt
    is computed; H2O, arXiv:2306.14048, afterwards), and the latest ones. Holds the whole prompt until it is computed,
    and then at most `tokens` and one more: it saves memory while decoding.
    Whole blocks go. Such sequences neither use nor feed the prefix cache.
    """

    policy: Literal["window", "importance"]
    tokens: int
    sinks: int = 16


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """A new sequence to generate."""

    id: str  # unique among live sequences
    prompt: list[int]
    generated: list[int] = []  # output made elsewhere: the sequence goes on behind it, and it counts as output
    sampling: Sampling
    limits: Limits
    priority: int = 0  # smaller goes first, as in vLLM
    admitted: bool = False  # its request was let in with an earlier sequence: a full queue does not refuse it
    cache_salt: bytes = b""  # prefix-cache blocks are shared only among equal salts
    tenant: str = ""  # who it is for: tenants get equal shares
    kv: KvBudget | None = None  # None: all its tokens stay
    arrival: float = 0.0  # seconds, `time.monotonic`
    # Nothing is generated where one of these is set: the answer is one Scored or Embedded, and then Finished (DONE).
    # Log-probabilities of the tokens from there on, `generated` ones too, each given all before; at least 1.
    score_from: int | None = None
    pool: Literal["mean", "last"] | None = None  # the final hidden states, pooled over the prompt


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    id: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process after the step under way."""


ToEngine = Submit | Cancel | Stop


class Finish(StrEnum):
    """Why a sequence ended, as far as the engine can know (stop strings are the front's)."""

    STOP_TOKEN = "stop_token"  # noqa: S105  no password
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    OUT_OF_MEMORY = "out_of_memory"
    OVERLOADED = "overloaded"  # the waiting queue is full
    TOO_LONG = "too_long"  # could never fit into the KV cache or the model's context
    NON_FINITE = "non_finite"  # what the model computed is no number: nothing can be drawn, scored or told
    DONE = "done"  # a text was scored or embedded


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: int
    logprob: float  # nats, of the distribution before temperature and filters


class NewToken(msgspec.Struct, frozen=True, array_like=True):
    id: str
    token: int
    logprob: float | None = None
    top: tuple[TokenLogprob, ...] = ()


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """Of each scored token: its log-probability, and the entropy of the distribution it was drawn from; nats."""

    id: str
    logprobs: list[float]
    entropies: list[float]


class Embedded(msgspec.Struct, frozen=True, array_like=True):
    id: str
    vector: list[float]  # (width,), not normalized


class Finished(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The end of a sequence. Times are seconds of `time.monotonic`; zero where a phase was never reached."""

    id: str
    reason: Finish
    stop_token: int | None = None
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    arrival: float = 0.0
    first_scheduled: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    preemptions: int = 0


class Started(msgspec.Struct, frozen=True, array_like=True):
    """A sequence left the waiting queue for the first time."""

    id: str
    cached_tokens: int
    first_scheduled: float


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the router weighs. Counts are of this moment; `*_total` only grow."""

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    pending_prefill_tokens: int
    cached_blocks: int
    digest: bytes  # a Bloom filter over the hashes of cached prefix blocks, see `engine/digest.py`
    steps_total: int
    preemptions_total: int
    cancelled_total: int
    freed_after_cancel_total: int  # blocks given back by cancels and deadlines, each within one step
    out_of_memory_total: int
    non_finite_total: int  # sequences that ended because what was computed for them is no number


class StepReport(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Published after every step that changed something, and every second while idle (a heartbeat)."""

    load: Load
    step_seconds: float = 0.0
    started: tuple[Started, ...] = ()
    tokens: tuple[NewToken, ...] = ()
    scored: tuple[Scored, ...] = ()
    embedded: tuple[Embedded, ...] = ()
    finished: tuple[Finished, ...] = ()


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Progress of the start: `stage` is `load` or `warm_up`."""

    stage: str
    done: int
    total: int


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str
    vocab_size: int
    max_context: int  # tokens, prompt and answer
    block_size: int
    total_blocks: int
    weight_bytes: int
    kv_bytes: int
    quantization: str
    parameters: int
    # Which chunks a prompt is cut into changes no bit of the result, so chunks may follow the load.
    chunk_invariant: bool = False
    kv_budgets: bool = False  # whether sequences with a KvBudget can be run
    # The runner computes the token behind the last one early: a block for it is taken where one is free.
    looks_ahead: bool = False
    kv_dtype: str = "float32"
    hidden_size: int = 0
    engine: str = "torch"  # what computes: torch, native (avx512), ...


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    facts: ModelFacts
    seconds: float


class Goodbye(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine ends on purpose; `blocks_in_use` is the proof that nothing leaked."""

    blocks_in_use: int


FromEngine = Loading | Ready | StepReport | Goodbye
