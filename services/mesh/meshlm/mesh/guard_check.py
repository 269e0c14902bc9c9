"""`meshlm guard check`: what the guard says of a text, and why. Nothing needs to run, and nothing is sent anywhere."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import replace

from rich.console import Console
from rich.markup import escape

from meshlm.chassis.config import ConfigError
from meshlm.guard.artefact import ArtefactError
from meshlm.guard.config import GuardConfig
from meshlm.guard.embedded_judge import EmbeddedJudge
from meshlm.guard.explain import Explanation, explain
from meshlm.guard.judges import Judges
from meshlm.guard.llama.config import PanelConfig
from meshlm.guard.policy import Policies, act_name
from meshlm.mesh.settings import add_config_arguments, read_settings
from meshlm.mesh.terminal import open_console

_STYLES = {"allow": "green", "flag": "yellow", "block": "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm guard`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser("check", help="judge a text as an input, and say why")
    check.add_argument("text", help="the text; `-` reads standard input")
    check.add_argument("--policy", default="", help="name of the policy (default: the guard's default)")
    add_config_arguments(check)


def run(arguments: argparse.Namespace) -> int:
    """`meshlm guard check`: 0, whatever the verdict."""
    config = read_settings(arguments).source.section("guard", GuardConfig)
    named = config.models
    try:
        judge = Judges(replace(config, model="embedded" if named else config.model, panel=PanelConfig())).judge
    except ArtefactError as error:
        raise ConfigError(f"guard.model_file: {error}") from None
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    policy = Policies(config.policies, judge).get(arguments.policy)
    model = judge.model if isinstance(judge, EmbeddedJudge) else None
    console = open_console()
    _show(asyncio.run(explain(policy, model, text)), text, console)
    if named:
        console.print(f"not asked: {escape(', '.join(named))}, which the mesh's workers serve", style="dim")
    return 0


def _show(told: Explanation, text: str, console: Console) -> None:
    verdict = told.verdict
    action = act_name(verdict.action)
    named = ", ".join(verdict.categories) or "nothing found"
    console.print(f"[{_STYLES[action]}]{action}[/]  score {verdict.score:.3f}  {escape(named)}")
    console.print(f"policy {verdict.policy_version}; ran {', '.join(verdict.detectors) or 'nothing'}", style="dim")
    for finding in told.findings:
        quoted = escape(repr(text[finding.start : finding.end])[:80])
        console.print(f"rule   {finding.score:.2f}  {finding.rule} ({finding.category}): {quoted}")
    for head, (scored, grams) in told.scores.items():
        about = f", {' '.join(told.categories)}" if head == "harm" and told.categories else ""
        place = f"characters {scored.start} to {scored.end}, read as {scored.form}"
        console.print(f"model  {scored.score:.3f}  {head} ({place}{about})")
        for gram, weight in grams:
            console.print(f"       {weight:+.2f}  {escape(repr(gram))}")
