"""Incremental text equals the text of the whole, for any tokens, and never holds half a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from meshlm.worker.text.detokenizer import Detokenizer
from meshlm.worker.text.tokenizer import Tokenizer, TokenizerFacts
from meshlm.worker.text.vocabulary import byte_alphabet

FACTS = TokenizerFacts(bos_id=None, eos_id=None, eos_ids=frozenset(), adds_bos=False, chat_template=None)


def byte_tokenizer() -> Tokenizer:
    """One token a byte, one control token."""
    vocab = dict(byte_alphabet().items())
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return Tokenizer(backend, FACTS)


def spaced_tokenizer() -> Tokenizer:
    """SentencePiece's way: a space before the first word, which decoding takes off again."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab = bytes_ | {"\u2581": 256, "a": 257, "\u2581a": 258, "<unk>": 259}
    backend = Backend(models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, FACTS)


TOKENIZERS = {"byte-level": byte_tokenizer(), "spaced": spaced_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(ids=st.lists(st.integers(0, 300), max_size=40), skip=st.booleans())
def test_pieces_joined_equal_the_whole(kind: str, ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = Detokenizer(tokenizer, skip_control=skip)
    pieces = [stream.push(index) for index in ids]
    assert "".join([*pieces, stream.flush()]) == tokenizer.decode(ids, skip_control=skip)


@given(text=st.text(max_size=30))
def test_of_valid_text_no_piece_ever_holds_a_replacement(text: str) -> None:
    text = text.replace("\ufffd", "")
    tokenizer = TOKENIZERS["byte-level"]
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


@given(ids=st.lists(st.integers(0, 255), max_size=40))
def test_decoding_bytes_equals_the_tokenizers_library(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    assert tokenizer.decode(ids) == tokenizer._plain.decode(ids)


def test_a_stream_that_goes_on_keeps_its_first_space() -> None:
    assert Detokenizer(TOKENIZERS["spaced"]).push(258) == "a"
    assert Detokenizer(TOKENIZERS["spaced"], continues=True).push(258) == " a"
