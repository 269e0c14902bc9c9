"""Peers: guards that packages carry ready-made. A name in (the argument), then texts in, one score each out.

Two of them load pickles, which may run anything: so they do it here, in an environment and a process of their own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence

_BATCH = 16  # texts that the transformer takes at a time


def nanoguard() -> Callable[[Sequence[str]], list[float]]:
    """NanoGuard, a transformer of 16.8 million parameters that reads 512 tokens."""
    import torch
    from nanoguard.scanner import NanoGuard

    torch.set_num_threads(1)
    model = NanoGuard(device="cpu")
    return lambda texts: [
        told.injection_score
        for at in range(0, len(texts), _BATCH)
        for told in model.scan_batch(list(texts[at : at + _BATCH]))
    ]


def prompt_guardrail() -> Callable[[Sequence[str]], list[float]]:
    """Logistic regression on words; it tells how sure it is of its label, whichever that is."""
    from guardify import detect

    def score(text: str) -> float:
        told = detect(text)
        return float(told["score"] if told["label"] == "injection" else 1 - told["score"])

    return lambda texts: [score(text) for text in texts]


def profanity_check() -> Callable[[Sequence[str]], list[float]]:
    """A linear model of swear words."""
    from profanity_check import predict_prob

    return lambda texts: [float(score) for score in predict_prob(list(texts))]


def securevector() -> Callable[[Sequence[str]], list[float]]:
    """SecureVector Guardian, an n-gram model in pure Python."""
    from svguardian import resolve_runtime
    from svguardian.model.pure_infer import PureGuardian
    from svguardian.window import predict_windowed

    model = PureGuardian.load(resolve_runtime(download=False))
    return lambda texts: [predict_windowed(model, text)["malicious_score"] for text in texts]


_GUARDS = {guard.__name__: guard for guard in (nanoguard, prompt_guardrail, profanity_check, securevector)}


def main() -> None:
    scores = _GUARDS[sys.argv[1]]()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"scores": scores(json.loads(line)["texts"])}), flush=True)


if __name__ == "__main__":
    main()
