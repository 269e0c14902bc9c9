"""The phrases compiled: what the input detector looks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshlm.guard.normalize import fold
from meshlm.guard.phrases import ENGLISH, EXFILTRATION, LEAK, PERSONA, Phrase
from meshlm.guard.phrases_world import WORLD

VERSION = "signatures/2"


@dataclass(frozen=True)
class Signature:
    """One phrase family. It is tried only on texts with one of `needs` in them, which is quickly known."""

    rule: str
    category: str
    weight: float
    needs: frozenset[str]
    pattern: re.Pattern[str]


_WORDS = {
    "IGNORE": r"(?:ignor(?:e|ing)|disregard(?:ing)?|forget(?:ting)?|overrid(?:e|ing)|bypass(?:ing)?|neglect|"
    r"do_not_follow|don['’]?t_follow|stop_following|pay_no_attention_to|do_not_obey|disobey)",
    "FILL": r"(?:(?:a[li1]{2}|any|every|each|of|the|these|those|other|and|or|everything|completely|totally|now|to|in|"
    r"from|given|that|were|was)_){0,6}",
    "PAST": r"(?:previous(?:ly)?|prior|preceding|above|earlier|foregoing|initial|original|former|past|existing|system|"
    r"developer|safety|hidden)",
    "ORDERS": r"(?:instructions?|prompts?|directives?|guidelines?|programming|restrictions?|constraints?|rules|"
    r"policies)",
    "MODEL": r"(?:ai|assistants?|llms?|language_models?|chatbots?|chatgpt|gpt|claude|gemini|copilot|bots?|models?)",
    "SHOW": r"(?:reveal|show|print|repeat|output|display|tell_me|give_me|write_(?:out|down)|dump|leak|recite|return|"
    r"disclose|expose|copy|share|spell_out|summari[sz]e|translate)",
    "LIMITS": r"(?:restrictions?|limits?|limitations?|filters?|filtering|rules|guidelines?|ethics|morals?|censorship|"
    r"boundaries|safeguards?|guardrails?|constraints?|policies|safety)",
    "FREE": r"(?:unrestricted|unfiltered|uncensored|unlimited|unbound|unchained|amoral|evil|jailbroken|rogue|"
    r"unethical)",
    # Any words. Possessive, and a gap is required: otherwise one long word could be cut in millions of ways.
    "W2": r"(?:\w{1,20}+\W{1,12}+){0,2}",
    "W3": r"(?:\w{1,20}+\W{1,12}+){0,3}",
    "W8": r"(?:\w{1,20}+\W{1,12}+){0,8}",
}
_GAP = r"[\W_]{0,12}"
# These begin with everyday words, which also end others (`input`, `contract as`): what begins with a Latin letter must
# begin a word. For the rest, a letter before it would only be a way round.
_AT_WORDS = frozenset((LEAK, PERSONA, EXFILTRATION))
_WORD_START = r"(?:(?<![a-z])|(?![a-z]))"


def _compile(phrase: Phrase) -> Signature:
    pattern = phrase.pattern
    for name, words in _WORDS.items():
        pattern = pattern.replace("{" + name + "}", words)
    # Patterns are spelled as the plain reading spells a text; the gaps must not be touched by that.
    spelled = fold(pattern.replace("_", "\0")).replace("\0", _GAP)
    compiled = re.compile(f"{_WORD_START}(?:{spelled})" if phrase.category in _AT_WORDS else spelled)
    needs = frozenset(fold(need).casefold() for need in phrase.needs.split("|"))
    return Signature(phrase.rule, phrase.category, phrase.weight, needs, compiled)


SIGNATURES: tuple[Signature, ...] = tuple(_compile(phrase) for phrase in (*ENGLISH, *WORLD))
# Every word that some signature needs: looked for once in each reading.
NEEDS = frozenset(need for signature in SIGNATURES for need in signature.needs)
