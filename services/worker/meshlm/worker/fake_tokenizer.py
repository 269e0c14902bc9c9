"""The fake engine's tokenizer: token ids are bytes. A real one in all else, so that tests run the real text code."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken

from meshlm.worker.fake import END
from meshlm.worker.text.tokenizer import Tokenizer, TokenizerFacts
from meshlm.worker.text.vocabulary import byte_alphabet, byte_level_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def fake_tokenizer() -> Tokenizer:
    characters = {byte: character for character, byte in byte_alphabet().items()}
    backend = byte_level_tokenizer(Path("fake"), [characters[byte] for byte in range(256)], [], "gpt-2")
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    facts = TokenizerFacts(
        bos_id=None, eos_id=END, eos_ids=frozenset([END]), adds_bos=False, chat_template=CHAT_TEMPLATE
    )
    return Tokenizer(backend, facts)
