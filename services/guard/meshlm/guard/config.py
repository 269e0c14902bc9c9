"""The guard's configuration (`guard`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from meshlm.chassis.config import ServerConfig
from meshlm.guard.languages import check as check_languages
from meshlm.guard.llama.config import LlamaGuardConfig, PanelConfig
from meshlm.guard.scripts import check as check_scripts
from meshlm.guard.tool_schemas import ToolSchema

Act = Literal["allow", "flag", "redact", "block"]
DEFAULT_POLICY = "default"


@dataclass(frozen=True)
class PolicyConfig:
    """What is looked for, and what follows (`guard.policies.<name>`)."""

    # Detectors that read the input: rules (`signatures`; and, if asked, `secrets` and `pii`), and the model's heads
    # (`attack`, `harm`; `guard.model`).
    input_detectors: tuple[Literal["signatures", "secrets", "pii", "attack", "harm"], ...] = (
        "signatures",
        "attack",
        "harm",
    )
    # Detectors that read the output: rules (`secrets`, `pii`), and the model's `harm`.
    output_detectors: tuple[Literal["secrets", "pii", "harm"], ...] = ("secrets", "pii", "harm")
    # Roles whose messages are the caller's own words, and are not judged. All others are.
    trusted_roles: tuple[str, ...] = ("system", "developer", "assistant")
    # Combined score of the input from which it is flagged. Range (0, 1].
    flag_score: float = 0.4
    # Combined score of the input from which it is refused. Range (0, 1].
    block_score: float = 0.8
    # The model's score of an attack from which an input is flagged. Range (0, 1].
    attack_flag_score: float = 0.7
    # The model's score of an attack from which an input is refused. Range (0, 1].
    attack_block_score: float = 0.9
    # The model's score of harmful content from which an input is flagged. Range (0, 1].
    harm_flag_score: float = 0.8
    # The model's score of harmful content from which an input is refused. Range (0, 1].
    harm_block_score: float = 0.9
    # The model's score of harmful content from which an answer is flagged. Range (0, 1].
    answer_flag_score: float = 0.9
    # The model's score of harmful content from which an answer is stopped if its next window, or its end, is scored so
    # too. Range (0, 1].
    answer_confirm_score: float = 0.95
    # The model's score of harmful content from which an answer is stopped at once. Range (0, 1].
    answer_block_score: float = 0.99
    # Tokens of an answer after which the model judges it, and then again; the last repeats. A token counts as 4 bytes.
    answer_windows: tuple[int, ...] = (16, 32, 64)
    # When text goes out that the model has yet to judge: `strict`: once it has, a window later; `fast`: at once, and
    # an answer may be stopped some words late. Secrets and PII are held back either way.
    answer_release: Literal["strict", "fast"] = "strict"
    # Combined score of signatures in texts of others (parts marked untrusted, messages of tools) from which an input is
    # flagged. Range (0, 1].
    indirect_flag_score: float = 0.3
    # And from which it is refused. Range (0, 1].
    indirect_block_score: float = 0.6
    # The model's score of an attack in texts of others from which an input is flagged. Range (0, 1].
    indirect_attack_flag_score: float = 0.7
    # And from which it is refused; 1 is never. Range (0, 1].
    indirect_attack_block_score: float = 0.88
    # Calls of tools in answers: `any`: they are not looked for; `listed`: those in `tools`, with fitting arguments;
    # `none`. An answer with another call is stopped before the call.
    tool_calls: Literal["any", "listed", "none"] = "any"
    # Tools that may be called: their names, and JSON schemas of their arguments, as text ("{}" takes any).
    tools: Mapping[str, str] = field(default_factory=dict)
    # Longest call, characters.
    tool_call_chars: int = 16_384
    # What happens when the model cannot judge: `refuse`, or `allow` what the rules allow. That the guard itself cannot
    # be reached is for the router's keys to say (router.keys.guard_failure).
    failure: Literal["refuse", "allow"] = "refuse"
    # What follows from a category (`pii.us_ssn`) or a family of them (`pii`), where it differs from the built-in
    # choice. `allow` turns it off; `redact` is for what `secrets` and `pii` find. On input it is the most that may
    # follow, whatever the score.
    actions: Mapping[str, Act] = field(default_factory=dict)
    # Scripts that an input may be written in, as Unicode names them (Latin, Cyrillic, Han); empty: any. One that is
    # largely in others is `language.script`, and refused unless `actions` says otherwise.
    scripts: tuple[str, ...] = ()
    # Languages that an input may be in (ISO 639: en, de, zh); empty: any. One of 24 letters or more that is surely in
    # another is `language.other`, and refused unless `actions` says otherwise.
    languages: tuple[str, ...] = ()
    # Nothing is refused, stopped, held or replaced: verdicts tell what would have been.
    shadow: bool = False

    def __post_init__(self) -> None:
        for prefix in ("", "attack_", "harm_", "answer_", "indirect_", "indirect_attack_"):
            if not 0 < getattr(self, f"{prefix}flag_score") <= getattr(self, f"{prefix}block_score") <= 1:
                raise ValueError(f"expected 0 < {prefix}flag_score <= {prefix}block_score <= 1")
        if not self.answer_flag_score <= self.answer_confirm_score <= self.answer_block_score:
            raise ValueError("expected answer_flag_score <= answer_confirm_score <= answer_block_score")
        self._check_tools()
        if unfit := [name for name, act in self.actions.items() if act == "redact" and not _is_pattern(name)]:
            raise ValueError(f"actions.{unfit[0]}: only `pii`, `secret` and categories of them can be redacted")
        check_scripts(self.scripts)
        check_languages(self.languages)
        if not self.answer_windows or min(self.answer_windows) < 1:
            raise ValueError("answer_windows: expected at least one number, each above 0")

    def _check_tools(self) -> None:
        if self.tools and self.tool_calls != "listed":
            raise ValueError('tools: has no meaning unless tool_calls = "listed"')
        if self.tool_call_chars < 64:
            raise ValueError("tool_call_chars: expected 64 or more")
        for name, schema in self.tools.items():
            try:
                ToolSchema(schema)
            except ValueError as error:
                raise ValueError(f"tools.{name}: {error}") from None

    def action(self, category: str, default: Act) -> Act:
        """What follows from a category: its own entry, else its family's, else `default`."""
        family = category.partition(".")[0]
        return self.actions.get(category, self.actions.get(family, default))


def _is_pattern(category: str) -> bool:
    """Whether patterns find it: where in a text it is, is known to the character."""
    return category.partition(".")[0] in ("pii", "secret")


@dataclass(frozen=True)
class GuardConfig:
    """What the guard accepts, and its policies."""

    # Where the service listens.
    server: ServerConfig = field(default_factory=lambda: ServerConfig(listen="127.0.0.1:50071"))
    # What judges beside the rules. `embedded`: the small model that the guard ships; `rules`: nothing; or the name of a
    # model that a worker serves (`llama_guard.workers`): it judges harm, and the embedded one attacks.
    model: str = "embedded"
    # File of the embedded model, as `python -m meshlm.guard.train` writes it. Unset: the one that the guard ships.
    model_file: str | None = None
    # How a model that a worker serves is asked.
    llama_guard: LlamaGuardConfig = field(default_factory=LlamaGuardConfig)
    # Other models that judge again where the first is unsure.
    panel: PanelConfig = field(default_factory=PanelConfig)
    # Policies by name. `default` is used where a request names none; it exists even if it is not written.
    policies: Mapping[str, PolicyConfig] = field(default_factory=dict)
    # Seconds between two looks at whether the file has changed; its policies then count from the next request on. A
    # SIGHUP asks at once. 0: only a SIGHUP does.
    reload_seconds: float = 2.0
    # Longest input, characters over all messages.
    max_input_chars: int = 500_000
    # Longest answer of one choice, characters.
    max_output_chars: int = 4_000_000
    # Most choices of one output check.
    max_choices: int = 8
    # Texts longer than this are judged in a thread, so that other streams go on. Characters.
    inline_chars: int = 4_096

    def __post_init__(self) -> None:
        if self.reload_seconds < 0:
            raise ValueError("reload_seconds must be at least 0")
        for name in ("max_input_chars", "max_output_chars", "max_choices", "inline_chars"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")
        if not self.model:
            raise ValueError("model: expected `embedded`, `rules` or a model's name")

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that workers serve for the guard."""
        first = () if self.model in ("embedded", "rules") else (self.model,)
        return tuple(name for name in (*first, self.panel.second.model, self.panel.third.model) if name)
