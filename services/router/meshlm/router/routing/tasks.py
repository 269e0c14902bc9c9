"""What a prompt asks for, as far as its words tell: a fact, or an invention. English only; in doubt, neither.

For routes that set the sampling of requests that leave it open. What it gets wrong costs little: an answer that is
drawn a little wider or narrower than it should be.
"""

from __future__ import annotations

import re
from typing import Literal

from meshlm.v1 import generation_pb2 as pb

Task = Literal["factual", "creative", "unknown"]

# What a task is told by stands at the ends of a message: documents are in between.
_END_CHARS = 400

_WORKS = (
    r"poems?|poetry|haikus?|limericks?|sonnets?|verses?|rhymes?|lyrics|songs?|raps?|ballads?|stor(?:y|ies)|tales?|"
    r"fables?|novels?|fiction|screenplays?|dialogues?|monologues?|jokes?|puns?|riddles?|slogans?|taglines?|mottos?|speech|toasts?|"
    r"love letters?|blog posts?|advertisements?|ads?|fan ?fiction|plots?|characters?|metaphors?|bedtime"
)
_CREATIVE = re.compile(
    r"\b(?:write|compose|create|draft|tell|give|make|sing|improvise|continue|start|begin)\b"
    rf"[^.?!\n]{{0,60}}\b(?:{_WORKS})\b"
    r"|\b(?:brainstorm|imagine|invent|make up|dream up|come up with|role-?play|pretend|be creative|surprise me|"
    r"once upon a time|name ideas|gift ideas|ideas for|in the (?:style|voice) of|"
    r"from the (?:perspective|point of view) of)\b"
)
_FACTUAL = re.compile(
    r"(?:^|[.?!\n:]\s*|\b(?:and|so|then|please) )(?:who|whom|whose|what|when|where|which|"
    r"how (?:many|much|long|far|old|tall|often|big|high|fast|do|does|did|is|are|can)|why|"
    r"is|are|was|were|does|do|did|has|have|can)\b"
    r"|\b(?:calculate|compute|solve|convert|translate|define|definition of|summari[sz]e|extract|classify|identify|"
    r"list (?:the|all)|explain|prove|derive|evaluate|simplify|debug|fix|refactor|implement|true or false|yes or no|"
    r"answer with|according to|correct (?:answer|option)|sql|regex|json|function|python|javascript)\b"
    r"|\d\s*[-+*/×÷=^]\s*\d|\n[a-e][.)] "
)  # fmt: skip


def task_of(source: pb.Input) -> Task:
    """What the last message of the user, or a plain prompt, asks for."""
    ends = ends_of(last_words(source)).lower()
    if _CREATIVE.search(ends):
        return "creative"
    return "factual" if _FACTUAL.search(ends) else "unknown"


def ends_of(text: str, chars: int = _END_CHARS) -> str:
    """What is looked at, however long the text is: its first and last characters."""
    return text if len(text) <= 2 * chars else f"{text[:chars]}\n{text[-chars:]}"


def last_words(source: pb.Input) -> str:
    """The last message of the user; a plain prompt whole; empty for token ids."""
    if source.WhichOneof("input") == "chat":
        return next((turn.content for turn in reversed(source.chat.messages) if turn.role == "user"), "")
    return source.prompt
