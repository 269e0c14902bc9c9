"""Text to token ids and back, from a GGUF file's metadata or a Hugging Face `tokenizer.json`.

The vocabulary is built by the `tokenizers` library; what differs by file is gathered in a `Vocabulary` first. Control
tokens (`<|im_end|>`) are parsed out of text only where the caller says so: user text must not be able to write them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from meshlm.worker.loading.errors import ModelFileError
from meshlm.worker.loading.gguf_file import GgufFile
from meshlm.worker.loading.json_file import read_json
from meshlm.worker.text.vocabulary import VocabularyError, byte_level_tokenizer, scored_tokenizer, token_bytes_table

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
# Phi-3's tokens swallow the white space behind them, but for these. GGUF files do not say so; llama.cpp knows it too.
_PHI3_KEEPS_SPACE = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a file says beside the vocabulary itself."""

    bos_id: int | None
    eos_id: int | None  # the one that templates write
    eos_ids: frozenset[int]  # tokens that end an answer
    adds_bos: bool  # whether a plain prompt starts with `bos_id`
    chat_template: str | None


class Tokenizer:
    """Immutable and safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, facts: TokenizerFacts) -> None:
        """`backend` must have its control tokens added as special tokens; it becomes this object's own."""
        self.facts = facts
        definition = backend.to_str()
        self._parsing = backend
        self._parsing.encode_special_tokens = False
        self._plain = tokenizers.Tokenizer.from_str(definition)
        self._plain.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.control_tokens = {token.content: index for index, token in added.items() if token.special}
        self.control_ids = frozenset(self.control_tokens.values())
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._bytes = token_bytes_table(json.loads(definition), vocab, added, self.vocab_size)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """A GGUF file or a Hugging Face folder. Raises ModelFileError."""
        return _from_folder(path) if path.is_dir() else _from_gguf(GgufFile(path))

    @property
    def bos_id(self) -> int | None:
        return self.facts.bos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.facts.eos_ids

    @property
    def strips_first_space(self) -> bool:
        """Whether the decoded text of a whole prompt loses the space that the encoder put before it."""
        return self._bytes.strips_first_space

    def encode(self, text: str, *, parse_control: bool = False, add_bos: bool = False) -> list[int]:
        """Ids of a text. Lone surrogates, which UTF-8 cannot hold, become U+FFFD.

        parse_control: read control tokens written in the text as such; otherwise they are spelled out as text.
        add_bos: put the beginning token first if the model's file asks for one.
        """
        clean = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        backend = self._parsing if parse_control else self._plain
        ids: list[int] = backend.encode(clean, add_special_tokens=False).ids
        if add_bos and self.facts.adds_bos and self.facts.bos_id is not None and ids[:1] != [self.facts.bos_id]:
            ids.insert(0, self.facts.bos_id)
        return ids

    def decode(self, ids: list[int], *, skip_control: bool = True) -> str:
        """The text of a whole sequence. Bytes that are no UTF-8 become U+FFFD, as the standard library replaces
        them.
        """
        data = b"".join(self.token_bytes(index, skip_control=skip_control) for index in ids)
        return self.strip_first(data).decode("utf-8", "replace")

    def strip_first(self, data: bytes) -> bytes:
        return data[1:] if self.strips_first_space and data.startswith(b" ") else data

    def token_bytes(self, token: int, *, skip_control: bool = True) -> bytes:
        """The bytes of one token: empty for control tokens that are skipped and for ids outside the vocabulary."""
        if skip_control and token in self.control_ids:
            return b""
        return self._bytes.by_id[token] if 0 <= token < self.vocab_size else b""

    def token_text(self, token: int) -> str:
        """A token's spelling for logprob reports, control tokens included."""
        return self.token_bytes(token, skip_control=False).decode("utf-8", "replace")


def _from_gguf(file: GgufFile) -> Tokenizer:
    meta = file.metadata
    tokens, types = file.require("tokenizer.ggml.tokens"), file.require("tokenizer.ggml.token_type")
    kind = file.require("tokenizer.ggml.model")
    if kind == "gpt2":
        merges = file.require("tokenizer.ggml.merges")
        backend = byte_level_tokenizer(file.path, tokens, merges, str(meta.get("tokenizer.ggml.pre", "default")))
    elif kind == "llama":
        scores = file.require("tokenizer.ggml.scores")
        prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
        unknown = int(meta.get("tokenizer.ggml.unknown_token_id", 0))
        backend = scored_tokenizer(file.path, tokens, scores, types, unknown, prefix)
    else:
        raise ModelFileError(file.path, f"the tokenizer model {kind!r} is unknown; known: gpt2, llama")
    phi3 = kind == "llama" and file.require("general.architecture") == "phi3"
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        chosen = [token for token, type_id in zip(tokens, types, strict=True) if type_id == wanted]
        added = [
            AddedToken(token, special=special, normalized=False, rstrip=phi3 and token not in _PHI3_KEEPS_SPACE)
            for token in chosen
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    eos = {meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    facts = TokenizerFacts(
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_id=meta.get("tokenizer.ggml.eos_token_id"),
        eos_ids=frozenset(index for index in eos if index is not None),
        adds_bos=bool(meta.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        chat_template=meta.get("tokenizer.chat_template"),
    )
    return Tokenizer(backend, facts)


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFileError(path, "no such file")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(path, f"not a tokenizer: {error}") from None
    settings = _optional_json(folder / "tokenizer_config.json")
    bos = _token_id(backend, settings.get("bos_token"))
    eos_id = _token_id(backend, settings.get("eos_token"))
    eos = {eos_id}
    for name in ("config.json", "generation_config.json"):
        found = _optional_json(folder / name).get("eos_token_id")
        eos |= set(found) if isinstance(found, list) else {found}
    facts = TokenizerFacts(
        bos_id=bos,
        eos_id=eos_id,
        eos_ids=frozenset(index for index in eos if index is not None),
        adds_bos=bos is not None and backend.encode("a").ids[:1] == [bos],
        chat_template=_folder_template(folder, settings),
    )
    try:
        return Tokenizer(backend, facts)
    except VocabularyError as error:
        raise ModelFileError(path, str(error)) from None


def _folder_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """`chat_template.jinja` since transformers 4.50, before that a field; several named ones: `default`."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_id(backend: tokenizers.Tokenizer, token: str | dict[str, Any] | None) -> int | None:
    content = token.get("content") if isinstance(token, dict) else token
    return None if content is None else backend.token_to_id(content)
