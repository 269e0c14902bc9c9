"""Peer: CTranslate2's Generator in int8: whole batches, none joins a batch under way."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ctranslate2
from protocol import THREADS, Run, Unable, serve


class Batches:
    def __init__(self, folder: Path) -> None:
        self._generator = ctranslate2.Generator(str(folder), device="cpu", compute_type="int8", intra_threads=THREADS)
        words = json.loads((folder / "vocabulary.json").read_text())
        self._words: list[str] = words

    def run(self, work: Run) -> None:
        if not work.all_at_once:
            raise Unable("no request joins a batch under way")
        work.due()

        def came(step: Any) -> bool:
            work.came(step.batch_id)
            return False

        self._generator.generate_batch(
            [[self._words[token] for token in prompt] for prompt in work.prompts],
            max_length=max(work.new),
            min_length=max(work.new),
            end_token=[],
            include_prompt_in_result=False,
            callback=came,
        )
        if not work.done:
            raise Unable(f"it stopped early, after {work.count(0)} of {work.new[0]} tokens")


def start() -> tuple[dict[str, Any], Any]:
    return {"version": f"CTranslate2 {ctranslate2.__version__}"}, Batches(Path(sys.argv[1])).run


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    serve(start)
