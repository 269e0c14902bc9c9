"""`python -m meshlm.worker.quantization.main`: what `meshlm quantize` runs, since only the worker may load torch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from meshlm.worker.config import default_cache_dir
from meshlm.worker.engine.settings import SettingsError
from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.opening import open_checkpoint
from meshlm.worker.loading.revision import model_revision
from meshlm.worker.quantization.cache import Measured, keep, plans_folder
from meshlm.worker.quantization.calibration import packaged_text, read_text, texts_of
from meshlm.worker.quantization.engine_rows import engine_rows
from meshlm.worker.quantization.measure import Request, keeps_blocks, measure_plan
from meshlm.worker.quantization.plan import Format, kind_of
from meshlm.worker.quantization.regroup import regrouped
from meshlm.worker.quantization.report import Answers, Row, as_data, as_table, format_rows, row_of
from meshlm.worker.quantization.scoring import ScoredModel, compare, reference
from meshlm.worker.text.tokenizer import Tokenizer

_TEXT = 512  # tokens
_CALIBRATION = 1024  # tokens
_ANSWERS = 6


def main() -> int:
    """Exit code 1 and one line where a file cannot be used."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        _report(arguments) if arguments.corpus else _measure_and_keep(arguments)
    except (ModelFileError, SettingsError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m meshlm.worker.quantization.main")
    parser.add_argument("model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--calibration", type=Path, help="a text to measure on; else a short one of our own")
    parser.add_argument("--rise", type=float, default=1.0, help="most percent that perplexity may rise by")
    parser.add_argument("--shrink", action="store_true", help="also quantize what the file has quantized")
    parser.add_argument("--corpus", type=Path, help="report on this text instead of keeping a plan")
    parser.add_argument("--tokens", type=int, default=20_480, help="of the corpus")
    parser.add_argument("--engine", action="store_true", help="report on the native engine as well")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _told(line: str) -> None:
    sys.stderr.write(f"\r\x1b[K{line}" if sys.stderr.isatty() else f"{line}\n")
    sys.stderr.flush()


def _calibration(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[torch.Tensor]:
    text = read_text(arguments.calibration) if arguments.calibration else packaged_text()
    return texts_of(text, tokenizer, _TEXT, _CALIBRATION)


def _measured(model: ScoredModel, texts: Sequence[torch.Tensor], arguments: argparse.Namespace) -> Measured:
    request = Request(arguments.rise / 100, arguments.shrink)
    measured, _ = measure_plan(model, texts, request, lambda done, total: _told(f"sensitivity {done} of {total}"))
    return measured


def _measure_and_keep(arguments: argparse.Namespace) -> None:
    model = ScoredModel(open_checkpoint(arguments.model))
    measured = _measured(model, _calibration(arguments, Tokenizer.load(arguments.model)), arguments)
    path = keep(plans_folder(), model_revision(arguments.model, default_cache_dir()), measured)
    _told("")
    facts = {"plan": str(path), "bits": measured.bits, "kl": measured.kl, "bound": measured.bound}
    counts = {kind: dict(sorted(found.items())) for kind, found in sorted(_counted(measured.formats).items())}
    if arguments.json:
        print(json.dumps(facts | {"matrices": counts}))
        return
    if not measured.formats:
        print("The file's weights are quantized already, and stay as they are: there is nothing to decide.")
        return
    for kind, found in counts.items():
        print(f"{kind:<10}", ", ".join(f"{count} x {wanted}" for wanted, count in found.items()))
    print(f"{measured.bits:.2f} bits a weight; divergence {measured.kl:.5f} nats a token, bound {measured.bound:.5f}")
    print(f"kept as {path}")


def _counted(formats: Mapping[str, Format]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for name, wanted in formats.items():
        found = counts.setdefault(kind_of(name), {})
        found[str(wanted)] = found.get(str(wanted), 0) + 1
    return counts


def _report(arguments: argparse.Namespace) -> None:
    tokenizer, checkpoint = Tokenizer.load(arguments.model), open_checkpoint(arguments.model)
    texts = texts_of(read_text(arguments.corpus), tokenizer, _TEXT, arguments.tokens)
    own = [name for name in checkpoint.names if name.endswith(".weight") and keeps_blocks(checkpoint, name)]
    model = ScoredModel(regrouped(checkpoint) if own else checkpoint)
    _told("the exact model")
    exact = reference(model, texts)
    answers = Answers.of(model, texts, _ANSWERS)
    sizes = sum(matrix.numel() for matrix in model.matrices.values())
    itself = compare(model, exact)
    rows = [row_of("float32 (reference)", itself, 32.0, sizes, None)]
    arguments.shrink = True
    measured = _measured(model, _calibration(arguments, tokenizer), arguments)
    candidates = {
        "int8": dict.fromkeys(model.matrices, Format.INT8),
        "int4, symmetric": dict.fromkeys(model.matrices, Format.INT4_SYMMETRIC),
        "int4, with minimum": dict.fromkeys(model.matrices, Format.INT4),
        f"auto (bound {arguments.rise:g}%)": measured.formats,
    }
    rows += format_rows(model, exact, answers, candidates, measured.importance, _told)
    if arguments.engine:
        _told("the native engine")
        rows += engine_rows(arguments.model, texts, itself.reference_loss, sizes, arguments.threads)
    _told("")
    _print_report(arguments, rows, itself.tokens, bool(own))


def _print_report(arguments: argparse.Namespace, rows: list[Row], tokens: int, shuffled: bool) -> None:
    if arguments.json:
        print(json.dumps({"tokens": tokens, "regrouped": shuffled, "rows": as_data(rows)}))
        return
    print(as_table(rows))
    print(f"\n{tokens} tokens of {arguments.corpus.name}, in texts of {_TEXT}.")
    if shuffled:
        print(
            "The file is quantized itself, and its own blocks are taken over exactly: a worker serves what it holds.\n"
            "The rows show what the formats would cost its weights off their grid: channels shuffled, same function."
        )


if __name__ == "__main__":
    sys.exit(main())
