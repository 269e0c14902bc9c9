"""Token ids against llama.cpp and against files that transformers writes."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import unicodedata
import urllib.request
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.text.tokenizer import Tokenizer
from meshlm.worker.text.vocabulary import byte_alphabet, byte_level_tokenizer, scored_tokenizer
from tests.ports import free_port

AWKWARD = [
    "Hello world",
    " leading space",
    "trailing space ",
    "multiple   spaces\tand\ttabs",
    "line\n\nbreaks\r\n end",
    "3.14159 12345678 1,000,000",
    "I'm you're he'll WE'VE don't",
    "CamelCaseIdentifier snake_case_name",
    "def f(x):\n    return x**2  # comment",
    '{"a": [1, 2, {"b": null}]}',
    "¿Dónde está la biblioteca?",
    "Straße naïve café",
    "日本語のテキスト",
    "Привет, мир",
    "مرحبا بالعالم",
    "emoji 🙂👩‍👩‍👧 flags 🇫🇷",
    "a\u0301 combining e\u0308",
    "http://example.com/?q=a%20b&c=1#x",
    "<|im_start|>user\nhi<|im_end|>\n",
    "١٢٣ ½ ² Ⅳ 九",
    "",
    "\u200bzero\u200bwidth",
    "😀" * 5,
    "A" * 200,
    "\x00\x01 control",
]

MARKUP = [
    "<start_of_turn>user\nHi there<end_of_turn>\n",
    "<h1>Title</h1>\n\n\n\n<b>x</b>",
    "        deep\n\t\t\tindent",
    " <|im_start|> hello",
]


def random_strings(count: int) -> list[str]:
    source = random.Random(0)
    alphabet = "abc XYZ 0123 .,;:!?'\n\t-_/é日🙂²½١"
    return ["".join(source.choice(alphabet) for _ in range(source.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_path)


@pytest.fixture(scope="module")
def llama_cpp(smollm2_path: Path) -> Callable[[str, bool], list[int]]:
    return llama_cpp_ids(smollm2_path)


def llama_cpp_ids(path: Path) -> Callable[[str, bool], list[int]]:
    """llama.cpp's tokenize endpoint: (text, parse control tokens) to ids."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.port, params.verbosity, params.warmup = 128, 1, free_port(), 0, False
    params.hostnames = ["127.0.0.1"]
    server = xllamacpp.Server(params)

    def ids(text: str, parse: bool) -> list[int]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": parse}).encode()
        request = urllib.request.Request(
            server.listening_address + "/tokenize", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[int] = json.load(answer)["tokens"]
        return found

    return ids


@pytest.mark.model
@pytest.mark.oracle
def test_ids_equal_llama_cpps_on_awkward_and_random_strings(
    tokenizer: Tokenizer, llama_cpp: Callable[[str, bool], list[int]]
) -> None:
    for text in AWKWARD + random_strings(500):
        assert tokenizer.encode(text, parse_control=True) == llama_cpp(text, True), text
    for text in AWKWARD:
        assert tokenizer.encode(text) == llama_cpp(text, False), text


@pytest.mark.model
@pytest.mark.oracle
def test_ids_of_other_models_equal_llama_cpps() -> None:
    """Of GGUF files that whoever has them names: Qwen2's and Gemma's ways of tokenizing."""
    paths = [Path(name) for name in os.environ.get("MESHLM_TEST_MODELS", "").split(os.pathsep) if name]
    if not paths:
        pytest.skip("MESHLM_TEST_MODELS names no GGUF files")
    for path in paths:
        ours, theirs = Tokenizer.load(path), llama_cpp_ids(path)
        # llama.cpp does not compose accents as Qwen's own tokenizer.json does.
        texts = [unicodedata.normalize("NFC", text) for text in AWKWARD + MARKUP + random_strings(300)]
        for text in texts:
            assert ours.encode(text, parse_control=True) == theirs(text, True), (path, text)
            assert ours.decode(ours.encode(text), skip_control=False) == text


@pytest.mark.model
def test_every_string_comes_back_from_its_ids(tokenizer: Tokenizer) -> None:
    for text in AWKWARD + random_strings(100):
        assert tokenizer.decode(tokenizer.encode(text), skip_control=False) == text
        assert tokenizer.decode(tokenizer.encode(text, parse_control=True), skip_control=False) == text


@pytest.mark.model
def test_control_tokens_are_parsed_only_where_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_end|>", parse_control=True) == [2]
    spelled = tokenizer.encode("<|im_end|>")
    assert not set(spelled) & tokenizer.control_ids
    assert tokenizer.decode(spelled) == "<|im_end|>"
    assert tokenizer.decode([2]) == ""
    assert tokenizer.eos_ids == {2}


@pytest.mark.model
def test_a_lone_surrogate_does_not_stop_a_request(tokenizer: Tokenizer) -> None:
    assert "a" in tokenizer.decode(tokenizer.encode("a\ud800b"))


def test_the_front_process_needs_no_torch() -> None:
    code = (
        "import sys, meshlm.worker.text.chat_template, meshlm.worker.text.detokenizer, meshlm.worker.text.stop_strings,"
        "meshlm.worker.loading.revision; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "it's 12345 \n\n x", ["it", "'s", "Ġ", "123", "45", "ĠĊĊ", "Ġx"]),
        ("qwen2", "it's 123 x", ["it", "'s", "Ġ", "1", "2", "3", "Ġx"]),
        ("gpt-2", "it's 123 x", ["it", "'s", "Ġ123", "Ġx"]),
        ("smollm", "it's 123 x", ["it", "'s", "Ġ", "1", "2", "3", "Ġx"]),
    ],
)
def test_text_is_cut_as_the_models_makers_cut_it(pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = byte_level_tokenizer(Path("m.gguf"), list(byte_alphabet()), [], pre)
    cutter = tokenizer.pre_tokenizer
    assert cutter is not None
    assert [piece for piece, _ in cutter.pre_tokenize_str(text)] == pieces


def test_an_unknown_pre_tokenizer_is_named() -> None:
    with pytest.raises(ModelFileError, match=r"m\.gguf: the pre-tokenizer 'tekken' is unknown"):
        byte_level_tokenizer(Path("m.gguf"), ["a"], [], "tekken")


def sentencepiece_by_definition(text: str, scores: dict[str, float]) -> list[str]:
    """Merge the neighbours whose union has the best score, the leftmost of equals, until nothing merges."""
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        unions = [(scores.get(a + b), -at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
        possible = [(score, at) for score, at in unions if score is not None]
        if not possible:
            return parts
        at = -max(possible)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_scored_merges_follow_sentencepieces_rule() -> None:
    source = random.Random(1)
    letters = ["\u2581", "a", "b", "c"]
    words = {"".join(source.choice(letters) for _ in range(source.randint(2, 4))) for _ in range(60)}
    tokens = ["<unk>", *letters, *sorted(words)]
    scores = {token: -float(rank) for rank, token in enumerate(source.sample(tokens, len(tokens)))}
    types = [2] + [1] * (len(tokens) - 1)
    backend = scored_tokenizer(Path("m.gguf"), tokens, [scores[token] for token in tokens], types, 0, True)
    for _ in range(200):
        text = "".join(source.choice("abc ") for _ in range(source.randint(1, 12)))
        assert backend.encode(text).tokens == sentencepiece_by_definition(text, scores), text


def test_a_control_token_never_comes_out_of_merges() -> None:
    tokens = ["<unk>", "\u2581", "<", "s", ">", "<s", "<s>"]
    backend = scored_tokenizer(Path("m.gguf"), tokens, [0.0] * 7, [2, 1, 1, 1, 1, 1, 3], 0, False)
    assert backend.encode("<s>").tokens == ["<s", ">"]


def write_vocabulary(path: Path, architecture: str) -> Path:
    """A SentencePiece vocabulary of letters, with the byte tokens that stand for what is in none."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "<|end|>",
    ]
    types = [2, 3, 3] + [6] * 256 + [1] * 4 + [3]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(types)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_phi3s_control_tokens_swallow_the_white_space_behind_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_vocabulary(tmp_path / "m.gguf", "phi3"))
    spelled = [tokenizer.token_text(index) for index in tokenizer.encode("<|end|>\n b<s> b", parse_control=True)]
    assert spelled == ["<|end|>", " ", "b", "<s>", " ", " ", "b"]


def test_other_models_control_tokens_leave_white_space_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_vocabulary(tmp_path / "m.gguf", "llama"))
    assert tokenizer.encode("<|end|>\nb", parse_control=True)[1:] == tokenizer.encode("\nb")


def test_bytes_of_characters_outside_the_vocabulary_are_spelled_and_come_back(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_vocabulary(tmp_path / "m.gguf", "llama"))
    ids = tokenizer.encode("a\u00e9")
    assert [tokenizer.token_bytes(index) for index in ids] == [b" a", b"\xc3", b"\xa9"]
    assert tokenizer.decode(ids) == "a\u00e9"
