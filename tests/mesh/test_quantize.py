"""The command hands its words on, and the corpus is a fixed sample."""

from __future__ import annotations

import argparse
from pathlib import Path

from meshlm.mesh.quantize import add_arguments, command, passages


def test_what_is_not_given_is_left_to_the_worker() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = command(parser.parse_args(["m.gguf"]), None)
    assert words[1:] == ["-m", "meshlm.worker.quantization.main", "m.gguf"]


def test_every_option_reaches_the_worker() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = "m.gguf --report --engine --tokens 100 --calibration c.txt --rise 2.5 --shrink --threads 1 --json"
    words = command(parser.parse_args(given.split()), Path("corpus.txt"))
    assert " ".join(words[4:]) == (
        "--corpus corpus.txt --calibration c.txt --rise 2.5 --threads 1 --tokens 100 --shrink --engine --json"
    )


def test_the_order_of_passages_is_not_that_of_the_file() -> None:
    texts = [f"passage {number}" for number in range(50)]
    assert passages(texts) == passages(list(reversed(texts)) + texts)
    assert sorted(passages(texts)) == sorted(texts)
    assert passages(texts) != sorted(texts)
