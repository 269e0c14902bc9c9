"""Which models judge beside the rules, as the configuration says."""

from __future__ import annotations

import asyncio

from meshlm.chassis.config import ConfigError
from meshlm.guard.combined import CombinedJudge, Member
from meshlm.guard.config import GuardConfig
from meshlm.guard.embedded import EmbeddedModel
from meshlm.guard.embedded_judge import EmbeddedJudge
from meshlm.guard.judging import Judge
from meshlm.guard.llama.config import Asking
from meshlm.guard.llama.judge import LlamaGuardJudge
from meshlm.guard.llama.model import JudgingModel
from meshlm.guard.llama.workers import Workers
from meshlm.guard.panel import Panel

# Seconds after start in which a model is asked again whether it can judge: its worker may load for longer.
_CHECK_SECONDS = 5.0


class Judges:
    """The judge of a configuration, and the connections it lives on."""

    def __init__(self, config: GuardConfig) -> None:
        """Inside the event loop that will use it, where models are named. Raises ArtefactError and ConfigError."""
        self._config = config
        self._workers: Workers | None = None
        self._remote: list[LlamaGuardJudge] = []
        self._checking: asyncio.Task[None] | None = None
        # None where rules judge alone.
        self.judge = self._panel(self._first())

    async def start(self) -> None:
        """Connect, and see who answers. Models that do not yet are no reason not to serve: see `JudgeError`."""
        if self._workers is None:
            return
        self._workers.start()
        answering = await asyncio.gather(*(judge.check() for judge in self._remote))
        if not all(answering):
            self._checking = asyncio.create_task(self._check_again())

    async def stop(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
        if self._workers is not None:
            await self._workers.stop()

    async def _check_again(self) -> None:
        """Until every model can judge, so that no first request pays for what is learnt of it."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            if all(await asyncio.gather(*(judge.check() for judge in self._remote))):
                return

    def _first(self) -> Judge | None:
        config = self._config
        if config.model == "rules":
            return None
        embedded = EmbeddedJudge(EmbeddedModel.load(config.model_file), config.inline_chars)
        if config.model == "embedded":
            return embedded
        # A model that is asked about harm knows nothing of attacks on the model that answers.
        named = self._named("model", config.model, config.llama_guard)
        return CombinedJudge([Member(embedded, ("attack",)), Member(named, ("harm",))])

    def _panel(self, first: Judge | None) -> Judge | None:
        config = self._config.panel
        if not config.second.model:
            return first
        if first is None:
            raise ConfigError("guard.panel.second: needs a model that judges first (guard.model)")
        second = self._named("panel.second.model", config.second.model, config.second)
        third = self._named("panel.third.model", config.third.model, config.third) if config.third.model else None
        return Panel(first, second, third, config)

    def _named(self, key: str, name: str, asking: Asking) -> LlamaGuardJudge:
        """A model that a worker serves. Raises ConfigError."""
        config = self._config.llama_guard
        if not config.workers:
            raise ConfigError(f"guard.llama_guard.workers: required, for guard.{key} names a model")
        if key != "model" and name == self._config.model:
            raise ConfigError(f"guard.{key}: the model that judges first cannot judge again")
        if self._workers is None:
            self._workers = Workers(config)
        try:
            model = JudgingModel(name, asking, config)
        except ValueError as error:
            raise ConfigError(f"guard.llama_guard.{error}") from None
        judge = LlamaGuardJudge(model, config, self._workers)
        self._remote.append(judge)
        return judge
