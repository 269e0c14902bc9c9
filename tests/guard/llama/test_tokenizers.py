"""The verdict's words as the tokens of real tokenizers: what is decoded of them spells verdicts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, trainers

from meshlm.guard.llama.decoding import Grammar, Tokens
from meshlm.guard.llama.grammar import Continuation, learn
from meshlm.guard.llama.prompts import VERSIONS
from meshlm.guard.llama.verdicts import parse
from meshlm.worker.text.tokenizer import Tokenizer

CODES = tuple(VERSIONS["llama-guard-3"].categories)


async def learnt(tokenizer: Tokenizer) -> Grammar:
    async def ask(continuations: Sequence[Continuation]) -> list[Tokens]:
        end = tokenizer.facts.eos_id
        assert end is not None
        return [(end,) if one.end_of_turn else tuple(tokenizer.encode(one.text)) for one in continuations]

    return await learn(CODES, ask)


async def check(tokenizer: Tokenizer) -> Grammar:
    grammar = await learnt(tokenizer)
    for one, other in itertools.permutations(CODES, 2):
        said = [*grammar.first[one], *grammar.more[other]]
        assert parse(tokenizer.decode(said), CODES).categories == (one, other)
        assert said == tokenizer.encode(f"unsafe\n{one},{other}")  # as the model would write it
    assert tokenizer.decode([*grammar.lead, grammar.safe]).strip()[:1] == "s"
    assert tokenizer.decode([*grammar.lead, grammar.unsafe]).strip()[:1] == "u"
    return grammar


@pytest.mark.model
async def test_of_a_byte_level_tokenizer(smollm2_path: Path) -> None:
    grammar = await check(Tokenizer.load(smollm2_path))
    assert (grammar.safe, grammar.unsafe) == (18437, 10082)  # by llama.cpp's


@pytest.mark.parametrize("size", [120, 400])
async def test_of_a_tokenizer_that_puts_a_space_before_a_text_as_llama_2_does(tmp_path: Path, size: int) -> None:
    """Small vocabularies spell that space by itself, larger ones in `▁safe`."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    words = ["safe", "unsafe", "a", "cake", "and", "some", "words", "of", "a", "question", "about", "the", "weather"]
    backend.train_from_iterator([*words * 5, "\n", ",", *CODES, "0123456789"], trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = Tokenizer.load(tmp_path)
    grammar = await check(tokenizer)
    assert grammar.end == tokenizer.facts.eos_id
