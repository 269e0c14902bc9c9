"""How far each choice of an answer has come, as its workers told it: what another worker, or another stream, goes on
from."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshlm.chassis.errors import MeshError, Reason
from meshlm.v1 import generation_pb2 as pb
from meshlm.v1 import worker_pb2


@dataclass
class Progress:
    """One choice."""

    resume_from: int = 0  # tokens that the caller has already: they are not sent again
    made: array[int] = field(default_factory=lambda: array("I"))  # ids of its tokens so far
    known: bool = True  # whether these are all
    paid_to: int = 0  # so many tokens were paid for with the stream that this one goes on with
    offset: int = 0  # after the last token that a worker told, in this stream
    begun: bool = False  # whether a worker told one, or its end, in this stream
    ended: bool = False  # whether a worker told its end

    def __post_init__(self) -> None:
        self.offset = max(self.offset, self.resume_from)

    def take(self, message: worker_pb2.RunGenerationResponse) -> None:
        """A worker's next chunk of it. Raises MeshError INTERNAL where the worker went on from another token."""
        chunk = message.chunk
        if not self.begun:
            self.begun = True
            self._skip(message.skipped_token_ids)
        elif message.skipped_text:
            message.ClearField("skipped_text")  # the guard has seen it, from the worker before
        if chunk.token_offset != self.offset:
            raise MeshError(Reason.INTERNAL, "a worker went on from another token")
        self.offset += chunk.token_count
        self.made.extend(chunk.token_ids)
        self.known = self.known and len(chunk.token_ids) == chunk.token_count
        self.ended = self.ended or chunk.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    def _skip(self, ids: Sequence[int]) -> None:
        """Its first chunk comes, behind tokens that are told where the worker knows them."""
        if len(ids) == self.offset:
            self.made = array("I", ids)
        else:
            self.made, self.known = self.made[: self.offset], len(self.made) >= self.offset


def ask_to_go_on(
    request: worker_pb2.RunGenerationRequest, progress: Sequence[Progress], unwanted: Sequence[int] = ()
) -> None:
    """Have a worker go on with every choice behind what was told of it. What was made and is not known the worker makes
    anew: with the same seed it is the same. `unwanted`: choices of which nobody wants more."""
    if len(progress) == 1:
        [only] = progress
        request.resume_from = only.offset
        request.generated[:] = only.made if only.known else ()
        return
    del request.so_far[:]
    if not any(choice.offset or choice.made or choice.ended for choice in progress):
        return
    for index, choice in enumerate(progress):
        ended = choice.ended or index in unwanted
        made = choice.made if choice.known and not ended else ()
        request.so_far.add(resume_from=choice.offset, generated=made, ended=ended)
