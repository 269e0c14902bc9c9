"""Orders in documents: what signatures and the embedded model find at which score, and what they take for one.

Attacks and harmless documents are AgentDojo's, none of which was trained on; harmless too are the descriptions of the
packages installed here, which are technical prose. Peer: the default policy's thresholds for what callers say
themselves. The policy's own for texts of others are `indirect_*` in guard.policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import distributions

from guard_sets import attacks
from harness import Row, options, report

from meshlm.guard.config import PolicyConfig
from meshlm.guard.embedded import EmbeddedModel
from meshlm.guard.injection import combined, detect
from meshlm.guard.training.descriptions import PACKAGES

_READ = 6_000  # characters of a description


def share(scores: Sequence[float], threshold: float) -> float:
    return sum(score >= threshold for score in scores) / len(scores)


def descriptions(most: int | None) -> list[str]:
    """Those of some length, by the package's name; none that was learned from."""
    learned = {package.name for package in PACKAGES}
    names = {d.metadata["Name"]: d.metadata.get_payload() for d in distributions()}
    found = {name: text for name, text in names.items() if name.lower().replace("_", "-") not in learned}
    texts = [text for _, text in sorted(found.items()) if isinstance(text, str) and len(text) > 400]
    return [text[:_READ] for text in texts[:most]]


def measure(quick: bool) -> list[Row]:
    texts = attacks()["agentdojo"]
    sets = {
        "AgentDojo, attacks": [text.text for text in texts if text.positive],
        "AgentDojo, harmless": [text.text for text in texts if not text.positive],
        "package descriptions": descriptions(20 if quick else None),
    }
    model, config, rows = EmbeddedModel.load(), PolicyConfig(), []
    for name, documents in sets.items():
        rules = [combined(detect(text)) for text in documents]
        scores = [model.judge(text, ("attack",))["attack"].score for text in documents]
        for who, found, ours, usual in (
            ("signatures", rules, config.indirect_block_score, config.block_score),
            ("model", scores, config.indirect_attack_block_score, config.attack_block_score),
        ):
            value, peer = share(found, ours), share(found, usual)
            label = f"{name}: refused by {who} at {ours:g}"
            rows.append(Row(label, "share", value, len(documents), 0.0, f"at {usual:g}", peer))
    return rows


def main() -> None:
    chosen = options(__doc__ or "")
    report("indirect", measure(chosen.quick), chosen.json)


if __name__ == "__main__":
    main()
