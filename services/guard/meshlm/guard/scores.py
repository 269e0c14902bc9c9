"""Scores from which a policy acts, where it does not say: they are of the model that judges harm.

The embedded model's are chosen by its figures on text that is harmless but looks otherwise (docs/guard-data.md). Llama
Guard's cards count 0.5 and more as unsafe; below it, from 0.3, is what a reader should hear of, and from 0.9 what need
not wait for a second window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from meshlm.chassis.config import ConfigError, Source
from meshlm.guard.config import DEFAULT_POLICY, GuardConfig, PolicyConfig

# Of a model that `guard.model` names; those of PolicyConfig are the embedded one's.
NAMED_MODEL: Mapping[str, float] = {
    "harm_flag_score": 0.3,
    "harm_block_score": 0.5,
    "answer_flag_score": 0.3,
    "answer_confirm_score": 0.5,
    "answer_block_score": 0.9,
}


def read_config(source: Source) -> GuardConfig:
    """The guard's configuration, with the scores that go with its model. Raises ConfigError."""
    config = source.section("guard", GuardConfig)
    if config.model in ("embedded", "rules"):
        return config
    written = {DEFAULT_POLICY: PolicyConfig()} | dict(config.policies)
    return replace(config, policies={name: _completed(source, name, policy) for name, policy in written.items()})


def _completed(source: Source, name: str, policy: PolicyConfig) -> PolicyConfig:
    path = f"guard.policies.{name}"
    unset = {key: score for key, score in NAMED_MODEL.items() if source.origin(f"{path}.{key}") == "default"}
    try:
        return replace(policy, **unset)  # type: ignore[arg-type]  # all are scores
    except ValueError as error:
        scores = ", ".join(f"{key} = {score:g}" for key, score in unset.items())
        raise ConfigError(f"{path}: {error}; where guard.model names a model, unset scores are {scores}") from None
