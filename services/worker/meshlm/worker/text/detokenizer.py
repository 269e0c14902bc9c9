"""Text out of tokens as they come, never half a character."""

from __future__ import annotations

import codecs

from meshlm.worker.text.tokenizer import Tokenizer


class Detokenizer:
    """One stream's. All text it gave, joined, equals `Tokenizer.decode` of all tokens it was given."""

    def __init__(self, tokenizer: Tokenizer, *, skip_control: bool = True, continues: bool = False) -> None:
        """continues: the stream goes on after other text (a prompt), so its first space is kept."""
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._strip = tokenizer.strips_first_space and not continues
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        data = self._tokenizer.token_bytes(token, skip_control=self._skip_control)
        if data and self._strip:
            data, self._strip = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end of the stream: U+FFFD where a character was left unfinished. Call once."""
        return self._decoder.decode(b"", final=True)
