"""Vocabularies: how a `tokenizers` model is built from GGUF metadata, and which bytes each token stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from meshlm.worker.loading.errors import ModelFileError

_NORMAL = 1  # GGUF token type
_SPACE = "\u2581"  # SentencePiece writes a space as this
_SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_QWEN2 = _SPLIT_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


class VocabularyError(ValueError):
    """A tokenizer whose tokens cannot be turned into bytes."""


def byte_level_tokenizer(path: Path, tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    """Byte-level BPE (GPT-2's). `pre` is the GGUF name of the rule that cuts text before merging."""
    splits = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "smollm": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        ),
        "llama-bpe": _split_by(_SPLIT_LLAMA3),
        "dbrx": _split_by(_SPLIT_LLAMA3),  # Phi-4
        "qwen2": _split_by(_SPLIT_QWEN2),
    }
    if pre not in splits:
        raise ModelFileError(path, f"the pre-tokenizer {pre!r} is unknown; known: {sorted(splits)}")
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = splits[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as Qwen's own tokenizer.json has it; llama.cpp leaves it out
    return tokenizer


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def scored_tokenizer(
    path: Path, tokens: list[str], scores: list[float], types: list[int], unknown: int, space_prefix: bool
) -> Tokenizer:
    """SentencePiece BPE: any two neighbours that form a normal token merge, the best score first.

    The library wants merges by rank, so every way to split a token into two tokens becomes a merge, ordered by score.
    """
    if not 0 <= unknown < len(tokens):
        raise ModelFileError(path, f"the unknown token's id {unknown} is outside the vocabulary")
    vocab = {token: index for index, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        for cut in range(1, len(token) if kind == _NORMAL else 1):  # control tokens must not come out of merges
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    ranked.sort()
    merges = [(left, right) for *_, left, right in ranked]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prepend = [normalizers.Prepend(_SPACE)] if space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What each id stands for, and whether a decoded text loses its first space."""

    by_id: list[bytes]
    strips_first_space: bool


def token_bytes_table(
    definition: Mapping[str, Any], vocab: Mapping[str, int], added: Mapping[int, AddedToken], size: int
) -> TokenBytes:
    """`definition` is the tokenizer as `tokenizer.json` has it. Raises VocabularyError: neither of the two kinds."""
    kinds = _decoder_kinds(definition.get("decoder"))
    by_id = [b""] * size
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        for token, index in vocab.items():
            known = all(character in alphabet for character in token)
            by_id[index] = bytes(alphabet[character] for character in token) if known else token.encode()
    elif kinds & {"ByteFallback", "Metaspace"}:
        for token, index in vocab.items():
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            by_id[index] = bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
    else:
        raise VocabularyError(f"the decoder {sorted(kinds)} is neither byte-level nor SentencePiece's")
    for index, special in added.items():
        by_id[index] = special.content.encode()
    return TokenBytes(by_id, "Strip" in kinds or "Metaspace" in kinds)


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> frozenset[str]:
    if decoder is None:
        return frozenset()
    if decoder["type"] == "Sequence":
        return frozenset(part["type"] for part in decoder["decoders"])
    return frozenset((decoder["type"],))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character to byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + offset): byte for offset, byte in enumerate(others)}
