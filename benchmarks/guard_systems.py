"""What `guard.py` measures: the guard's model and rules, and its peers. Each gives a text one score."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import harness
import numpy as np
from numpy.typing import NDArray

from meshlm.guard import injection
from meshlm.guard.config import GuardConfig
from meshlm.guard.embedded import EmbeddedModel
from meshlm.guard.judges import Judges
from meshlm.guard.judging import Head, JudgeError, Turn
from meshlm.guard.llama.config import LlamaGuardConfig
from meshlm.mesh import model as chat_model
from meshlm.mesh.launcher import isolated_mesh

# The packages, and what `guard_ready_made.py` calls what is in them.
READY_MADE = {
    "SecureVector Guardian 1.4.0": "securevector",
    "prompt-guardrail 1.0.1": "prompt_guardrail",
    "alt-profanity-check 1.9.1": "profanity_check",
    "NanoGuard 0.1.0": "nanoguard",
}
_PACKAGES = (
    ("torch==2.13.0", "tiktoken==0.12.0", "metatronnanoguard==0.1.0"),
    ("alt-profanity-check==1.9.1", "prompt-guardrail==1.0.1", "securevector-guardian-model==1.4.0"),
)
# Texts that a slow system is asked for, at most, of each side.
SLOW = {"NanoGuard 0.1.0": 40, "Llama Guard's prompt, SmolLM2": 40}
# What a first version of a filter would look for.
_KEYWORDS: dict[Head, re.Pattern[str]] = {
    "attack": re.compile(r"ignore|disregard|forget|jailbreak|system prompt|developer mode|\bdan\b|do anything now|"
                         r"pretend|unrestricted|no rules|bypass|override|act as|roleplay", re.IGNORECASE),
    "harm": re.compile(r"bomb|kill|murder|weapon|explosive|hack|steal|drug|suicide|rape|porn|terror|poison|malware|"
                       r"fraud|attack|racist|illegal|meth\b|shoot|hate", re.IGNORECASE),
}  # fmt: skip
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class System:
    """A system under test. `most`: texts of each side that it is asked for, where it is slow."""

    name: str
    scores: Callable[[Sequence[str]], Scores]
    most: int | None = None


def own(head: Head, model: EmbeddedModel) -> list[System]:
    """The model first; of attacks, the rules, and both as a policy has them; and the keywords."""
    ours = _remembering(_each(lambda text: model.judge(text, (head,))[head].score))
    rules = _remembering(_each(lambda text: injection.combined(injection.detect(text))))
    found = [System("model", ours)]
    if head == "attack":
        found += [System("rules", rules), System("both", lambda texts: np.maximum(ours(texts), rules(texts)))]
    return [*found, System("keywords", _each(lambda text: float(len(set(_KEYWORDS[head].findall(text.lower()))))))]


@contextmanager
def ready_made() -> Iterator[list[System]]:
    """The guards of packages, each in a process of its own, for as long as the context lasts."""
    peers = {name: harness.Peer("guard_ready_made.py", _PACKAGES, known) for name, known in READY_MADE.items()}
    try:
        yield [System(name, _remembering(_asking(peer)), SLOW.get(name)) for name, peer in peers.items()]
    finally:
        for peer in peers.values():
            peer.close()


async def zero_shot(texts: Sequence[str]) -> tuple[Scores, Scores]:
    """Scores of the small chat model that is asked in Llama Guard's words, of worker and guard as they are served; and
    milliseconds a text, one after the other."""
    chat_model.fetch()
    with TemporaryDirectory(prefix="meshlm-guard-") as folder, isolated_mesh(Path(folder), {}) as mesh:
        await mesh.start()
        asked = LlamaGuardConfig(workers=(mesh.address("worker"),), timeout_seconds=60.0, least_mass=0.0)
        judges = Judges(GuardConfig(model="smollm2-135m-instruct", llama_guard=asked))
        try:
            await judges.start()
            told = [await _timed(judges, text) for text in texts]
        finally:
            await judges.stop()
            await mesh.stop()
    return np.array([score for score, _ in told]), np.array([taken for _, taken in told])


async def _timed(judges: Judges, text: str) -> tuple[float, float]:
    assert judges.judge is not None
    loop = asyncio.get_running_loop()
    begun = loop.time()
    try:
        opinions = await judges.judge.judge_prompt([Turn("user", text[:2000])], ("harm",), tenant="", request_id="")
    except JudgeError:
        return 1.0, (loop.time() - begun) * 1000  # no verdict is unsafe
    return max((opinion.score for opinion in opinions), default=0.0), (loop.time() - begun) * 1000


def _asking(peer: harness.Peer) -> Callable[[Sequence[str]], Scores]:
    return lambda texts: np.array(peer.ask(texts=list(texts))["scores"], float)


def _remembering(scores: Callable[[Sequence[str]], Scores]) -> Callable[[Sequence[str]], Scores]:
    """Each text is judged once: sets share their harmless texts."""
    known: dict[str, float] = {}

    def told(texts: Sequence[str]) -> Scores:
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, scores(new), strict=True))
        return np.array([known[text] for text in texts], float)

    return told


def _each(score: Callable[[str], float]) -> Callable[[Sequence[str]], Scores]:
    return lambda texts: np.array([score(text) for text in texts], float)
