"""From a request's input to the token ids of the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import structlog

from meshlm.chassis.errors import MeshError, Reason, invalid
from meshlm.chassis.parts import content_of
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2
from meshlm.worker.text.chat_template import ChatTemplate, ChatTemplateError
from meshlm.worker.text.tokenizer import Tokenizer

INLINE_BYTES = 4096  # longer inputs are encoded on a thread, so that they hold up no stream
PATH = "generation.input"

log = structlog.get_logger()


class Prompts:
    """A model's way to read inputs. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ChatTemplateError for a model whose template is broken."""
        self.tokenizer = tokenizer
        source = tokenizer.facts.chat_template
        self._template = ChatTemplate(source, tokenizer) if source else None

    @property
    def chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    async def encode(self, source: pb.Input, *, control_tokens: bool, vocab_size: int, path: str = PATH) -> list[int]:
        """The prompt's tokens, at least one. `control_tokens`: whether a plain prompt may write them.

        Raises MeshError REQUEST_INVALID naming the field, which lies at `path`.
        """
        if source.ByteSize() <= INLINE_BYTES:
            tokens = self._encode(source, control_tokens, path)
        else:
            tokens = await asyncio.to_thread(self._encode, source, control_tokens, path)
        return _known(tokens, vocab_size, path, source.WhichOneof("input") or "")

    async def encode_continuation(self, source: worker_pb2.Continuation, *, vocab_size: int, path: str) -> list[int]:
        """The tokens of a text that follows an input, at least one. Raises MeshError REQUEST_INVALID."""
        kind = source.WhichOneof("continuation")
        if kind == "token_ids":
            tokens = list(source.token_ids.ids)
        elif kind == "end_of_turn":
            tokens = self._end_of_turn(source.end_of_turn, path)
        elif kind == "text" and source.ByteSize() <= INLINE_BYTES:
            tokens = self.tokenizer.encode(source.text)
        else:
            tokens = await asyncio.to_thread(self.tokenizer.encode, source.text)
        return _known(tokens, vocab_size, path, kind or "")

    async def encode_pieces(self, pieces: Sequence[worker_pb2.PromptPiece], *, vocab_size: int, path: str) -> list[int]:
        """The tokens of a prompt in pieces. Raises MeshError REQUEST_INVALID."""
        if sum(len(piece.text) for piece in pieces) <= INLINE_BYTES:
            tokens = self._encode_pieces(pieces)
        else:
            tokens = await asyncio.to_thread(self._encode_pieces, pieces)
        return _known(tokens, vocab_size, path, "text")

    def _encode_pieces(self, pieces: Sequence[worker_pb2.PromptPiece]) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += self.tokenizer.encode(piece.text, parse_control=piece.control_tokens, add_bos=number == 0)
        return ids

    def _end_of_turn(self, wanted: bool, path: str) -> list[int]:
        end = self.tokenizer.facts.eos_id
        if not wanted or end is None:
            raise invalid(f"{path}.end_of_turn", "must be true, for a model that has such a token")
        return [end]

    def _encode(self, source: pb.Input, control_tokens: bool, path: str) -> list[int]:
        if source.WhichOneof("input") == "chat":
            return self._encode_chat(source.chat, path)
        if source.WhichOneof("input") == "prompt":
            return self.tokenizer.encode(source.prompt, parse_control=control_tokens, add_bos=True)
        return list(source.token_ids.ids)

    def _encode_chat(self, chat: pb.Chat, path: str) -> list[int]:
        if self._template is None:
            raise invalid(f"{path}.chat", "the model has no chat template; send a prompt")
        messages = [_message(message) for message in chat.messages]
        opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
        try:
            return self._template.encode(messages, add_generation_prompt=opens)
        except ChatTemplateError as error:
            if (
                error.refused
            ):  # by the template's own rules, e.g. roles must alternate; its text is the model's author's
                raise invalid(f"{path}.chat.messages", "the model's chat template refuses them") from None
            log.error("chat template failed", error=type(error.__cause__ or error).__name__)
            raise MeshError(Reason.INTERNAL, "the model's chat template failed") from None


def _known(tokens: list[int], vocab_size: int, path: str, kind: str) -> list[int]:
    """The tokens, if there are any and the model has them all. Raises MeshError REQUEST_INVALID."""
    if not tokens:
        raise invalid(path, "has no tokens")
    if max(tokens) >= vocab_size:  # ids as given, or a tokenizer with more tokens than the model
        raise invalid(f"{path}.{kind}", f"has a token that the model lacks: each must be below {vocab_size}")
    return tokens


def _message(message: pb.Message) -> dict[str, str]:
    fields = {"role": message.role, "content": content_of(message)}
    return fields | {"name": message.name} if message.HasField("name") else fields
