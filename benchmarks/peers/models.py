"""The peers' forms of one GGUF file, written beside each other. Arguments: the GGUF file and the folder to fill.

`hugging_face` holds the dequantized weights in fp32, and all others but `q8_0.gguf` are made from it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

MATRIX = 2


def hugging_face(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def openvino(folder: Path, target: Path, **quantization: Any) -> None:
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    config = OVWeightQuantizationConfig(**quantization)
    OVModelForCausalLM.from_pretrained(folder, export=True, quantization_config=config, compile=False).save_pretrained(
        target
    )
    tokenizer(folder, target)


def tokenizer(folder: Path, target: Path) -> None:
    """GenAI asks for one even where token ids go in and come out."""
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    there = AutoTokenizer.from_pretrained(folder)
    there.save_pretrained(target)
    encoder, decoder = convert_tokenizer(there, with_detokenizer=True)
    save_model(encoder, target / "openvino_tokenizer.xml")
    save_model(decoder, target / "openvino_detokenizer.xml")


def ctranslate2(folder: Path, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(target), quantization="int8")


def q8_0(source: Path, target: Path) -> None:
    """The same GGUF file, its matrices in Q8_0."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = GGMLQuantizationType.Q8_0 if len(tensor.shape) == MATRIX else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    # Not needed for text, and of a build that does not fit to a torch for CPUs alone: as if it were not installed. The
    # libraries that look for it are imported later for that reason.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    source, folder = (Path(argument) for argument in sys.argv[1:])
    dense = folder / "hugging_face"
    steps: dict[str, Callable[[Path], None]] = {
        "hugging_face": lambda target: hugging_face(source, target),
        "openvino_int4": lambda target: openvino(dense, target, bits=4, sym=False, group_size=64, ratio=1.0),
        "openvino_int8": lambda target: openvino(dense, target, bits=8, sym=False),
        "ctranslate2_int8": lambda target: ctranslate2(dense, target),
        "q8_0.gguf": lambda target: q8_0(source, target),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in steps.items():
        if not (folder / name).exists():
            unfinished = folder / f"unfinished-{name}"
            rmtree(unfinished, ignore_errors=True)
            write(unfinished)
            unfinished.rename(folder / name)


if __name__ == "__main__":
    main()
