"""The GGUF container: every readable tensor type, and every way in which a file can be wrong."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.gguf_file import READABLE, GgufFile

SHAPE = (6, 512)


def raw_tensor(kind: Kind) -> np.ndarray:
    """Bytes of a random tensor: quantized by the gguf package where it can, else blocks with sane scales."""
    random = np.random.default_rng(0)
    try:
        return np.asarray(quantize(random.standard_normal(SHAPE, dtype=np.float32), kind))
    except NotImplementedError:
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (SHAPE[0], SHAPE[1] // per_block, block_bytes), dtype=np.uint8)
        scales = slice(-2, None) if kind == Kind.Q6_K else slice(0, 4)
        count = 2 if kind == Kind.Q6_K else 4
        blocks[..., scales] = np.full(count // 2, 0.01, np.float16).view(np.uint8)
        return blocks.reshape(SHAPE[0], -1)


def write(path: Path, kind: Kind) -> np.ndarray:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("strings", ["a", "é", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_float32("float", 0.5)
    writer.add_bool("flag", True)
    raw = raw_tensor(kind)
    writer.add_tensor("first", np.arange(5, dtype=np.float32))  # so that the next one is not at offset zero
    writer.add_tensor("weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


@pytest.mark.oracle
@pytest.mark.parametrize("kind", sorted(READABLE), ids=lambda kind: kind.name)
def test_a_tensor_equals_the_gguf_packages_dequantization(tmp_path: Path, kind: Kind) -> None:
    raw = write(tmp_path / "m.gguf", kind)
    ours = GgufFile(tmp_path / "m.gguf").read("weight")
    assert ours.shape == SHAPE
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all()
    assert ours.std() > 0
    np.testing.assert_array_equal(ours, dequantize(raw, kind).reshape(SHAPE))


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.F32)
    meta = GgufFile(tmp_path / "m.gguf").metadata
    assert meta["strings"] == ["a", "é", ""]
    assert meta["numbers"] == [1, -2, 3]
    assert meta["float"] == 0.5
    assert meta["flag"] is True
    assert meta["general.architecture"] == "llama"


@pytest.mark.parametrize("kept", [0, 3, 10, 60, 150, -1])
def test_a_truncated_file_says_so_wherever_it_ends(tmp_path: Path, kept: int) -> None:
    write(tmp_path / "m.gguf", Kind.Q8_0)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:kept])
    with pytest.raises(ModelFileError, match=r"m\.gguf: (truncated|the file is empty)"):
        GgufFile(tmp_path / "m.gguf")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=re.escape(str(tmp_path / "no.gguf")) + ": No such file"):
        GgufFile(tmp_path / "no.gguf")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        GgufFile(tmp_path / "m.gguf")


def test_an_unreadable_tensor_type_is_named_when_the_tensor_is_wanted(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.TQ1_0)
    file = GgufFile(tmp_path / "m.gguf")
    assert file.read("first").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ModelFileError, match="weight has the type TQ1_0, which cannot be read"):
        file.read("weight")


def test_a_missing_tensor_and_a_missing_key_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.F32)
    file = GgufFile(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match="the tensor absent is missing"):
        file.read("absent")
    with pytest.raises(ModelFileError, match=r"the metadata lacks llama\.block_count"):
        file.require("llama.block_count")


def with_metadata(path: Path, key: str, kind: int, value: bytes) -> Path:
    """A file without tensors whose one pair is this."""
    name = key.encode()
    pair = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    return path


@pytest.mark.parametrize("alignment", [0, 3, 2**32 - 1])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path, alignment: int) -> None:
    path = with_metadata(tmp_path / "m.gguf", "general.alignment", 4, struct.pack("<I", alignment))
    with pytest.raises(ModelFileError, match=f"general.alignment is {alignment}, not a power of two"):
        GgufFile(path)


@pytest.mark.parametrize("inner", [0, 8, 9, 12])
def test_an_array_of_absurd_length_is_refused(tmp_path: Path, inner: int) -> None:
    path = with_metadata(tmp_path / "m.gguf", "a", 9, struct.pack("<IQ", inner, 2**63))
    with pytest.raises(ModelFileError, match=r"truncated|an array of arrays"):
        GgufFile(path)


def test_arrays_nested_without_end_are_refused(tmp_path: Path) -> None:
    path = with_metadata(tmp_path / "m.gguf", "a", 9, struct.pack("<IQ", 9, 1) * 100_000)
    with pytest.raises(ModelFileError, match="an array of arrays"):
        GgufFile(path)


def test_rows_beyond_a_tensor_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", Kind.Q8_0)
    with pytest.raises(ModelFileError, match="weight has 6 rows; those from 4 to 7 are wanted"):
        GgufFile(tmp_path / "m.gguf").read_rows("weight", 4, 7)


def test_some_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    for kind in (Kind.F32, Kind.F16, Kind.Q4_K):
        write(tmp_path / "m.gguf", kind)
        file = GgufFile(tmp_path / "m.gguf")
        np.testing.assert_array_equal(file.read_rows("weight", 2, 5), file.read("weight")[2:5])
