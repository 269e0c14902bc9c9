"""Categories by scores: only what the grammar allows comes out, and of that the likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlm.guard.judging import JudgeError
from meshlm.guard.llama.decoding import MOST_TOKENS, Tokens, decode
from meshlm.guard.llama.grammar import BATCH, learn
from meshlm.guard.llama.verdicts import parse

CODES = [f"S{number}" for number in range(1, 15)]
END = 0


def by_letter(text: str) -> list[str]:
    return list(text)


def as_llama_3(text: str) -> list[str]:
    """Digits together, a comma with the letter behind it, and `unsafe` in two."""
    out: list[str] = []
    for letter in text.replace("unsafe", "\x01\x02").replace(",S", "\x03"):
        if out and letter.isdigit() and out[-1].isdigit():
            out[-1] += letter
        else:
            out.append(letter)
    return out


def with_a_space_first(text: str) -> list[str]:
    return [" ", *text]


class Model:
    """A tokenizer, and likelihoods of tokens by what they spell."""

    def __init__(self, cut: Any, wanted: str = "") -> None:
        self._cut = cut
        self._ids: dict[str, int] = {}
        self.wanted = wanted
        self.asked: list[int] = []

    def encode(self, text: str) -> Tokens:
        return tuple(self._ids.setdefault(piece, len(self._ids) + 1) for piece in self._cut(text))

    def decode(self, tokens: Sequence[int]) -> str:
        names = {number: piece for piece, number in self._ids.items()}
        text = "".join(names[token] for token in tokens)
        return text.replace("\x01\x02", "unsafe").replace("\x03", ",S")

    async def tokens(self, continuations: Sequence[Any]) -> list[Tokens]:
        assert len(continuations) <= BATCH
        return [(END,) if one.end_of_turn else self.encode(one.text) for one in continuations]

    async def score(self, behind: Sequence[int], options: Sequence[int]) -> list[float]:
        """Sure of the tokens of `wanted`; of all others the same."""
        self.asked.append(len(options))
        wanted = (*self.encode(self.wanted), END)
        right = wanted[len(behind)] if tuple(behind) == wanted[: len(behind)] else None
        return [math.log(0.9 if option == right else 0.01) for option in options]


@pytest.mark.parametrize("cut", [by_letter, as_llama_3, with_a_space_first])
@given(codes=st.lists(st.sampled_from(CODES), min_size=1, max_size=4, unique=True))
async def test_the_likeliest_codes_are_decoded_whatever_the_tokenizer(cut: Any, codes: list[str]) -> None:
    model = Model(cut, f"unsafe\n{','.join(codes)}")
    grammar = await learn(CODES, model.tokens)
    tokens = await decode(grammar, model.score)
    said = parse(model.decode(tokens), CODES).categories
    assert said == tuple(codes[: len(said)])
    assert len(said) == len(codes) or len(tokens) + 4 > MOST_TOKENS


@given(seed=st.randoms(use_true_random=False), cut=st.sampled_from([by_letter, as_llama_3]))
async def test_a_model_that_says_anything_still_gives_a_verdict(seed: Any, cut: Any) -> None:
    model = Model(cut)
    grammar = await learn(CODES, model.tokens)

    async def anything(behind: Sequence[int], options: Sequence[int]) -> list[float]:
        assert len(set(options)) == len(options) > 1
        return [-seed.random() for _ in options]

    tokens = await decode(grammar, anything)
    assert len(tokens) <= MOST_TOKENS
    codes = model.decode(tokens).partition("\n")[2].split(",")
    assert len(set(codes)) == len(codes)
    assert parse(model.decode(tokens), CODES).categories == tuple(codes)


async def test_only_places_with_a_choice_are_asked_about() -> None:
    model = Model(as_llama_3, "unsafe\nS3")
    grammar = await learn(CODES, model.tokens)
    await decode(grammar, model.score)
    assert model.asked == [14, 2]  # the number, and whether another follows


async def test_one_category_needs_no_question() -> None:
    model = Model(by_letter, "unsafe\nS7")
    grammar = await learn(["S7"], model.tokens)
    assert model.decode(await decode(grammar, model.score)) == "unsafe\nS7"
    assert model.asked == []


async def test_a_space_that_both_words_begin_with_tells_nothing() -> None:
    model = Model(with_a_space_first)
    grammar = await learn(CODES, model.tokens)
    assert [model.decode([t]) for t in (*grammar.lead, grammar.safe, grammar.unsafe)] == [" ", "s", "u"]


async def test_a_model_whose_verdicts_begin_alike_is_no_judge() -> None:
    async def alike(continuations: Sequence[Any]) -> list[Tokens]:
        return [(END,) if one.end_of_turn else (7,) for one in continuations]

    with pytest.raises(JudgeError, match="no token tells"):
        await learn(CODES, alike)
