"""`meshlm route explain`: what would happen to a request, and why. Nothing is run, counted or reserved."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from google.protobuf.json_format import MessageToJson
from rich.console import Console
from rich.markup import escape

from meshlm.mesh.client import Mesh
from meshlm.mesh.requests import Asked, Turn
from meshlm.mesh.settings import add_endpoint_arguments, find_endpoint
from meshlm.mesh.terminal import open_console, plain_table
from meshlm.v1 import generation_pb2
from meshlm.v1 import inference_pb2 as pb

_MICROS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`meshlm route`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    explain = actions.add_parser("explain", help="what would happen to this request")
    add_endpoint_arguments(explain)
    explain.add_argument("text", help="the question; `-` reads standard input")
    explain.add_argument("--model", default="", help="name, alias or route (default: the mesh's default model)")
    explain.add_argument("--system", default="", help="a system message before it")
    explain.add_argument("--session", default="", help="the conversation that it belongs to")
    explain.add_argument("--priority", choices=["critical", "interactive", "standard", "batch"])
    explain.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer (default: 512)")
    explain.add_argument("--temperature", type=float, default=0.0, help="default: 0, the most likely answer")
    explain.add_argument("--json", action="store_true", help="everything, for programs")


def run(arguments: argparse.Namespace) -> int:
    """`meshlm route explain`: 0, whether it would run or not."""
    endpoint = find_endpoint(arguments)
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    turns: list[Turn] = [("system", arguments.system)] if arguments.system else []
    asked: Asked = {
        "messages": [*turns, ("user", text)],
        "model": arguments.model,
        "session": arguments.session,
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
    }
    if arguments.priority:
        asked["priority"] = arguments.priority
    with Mesh(endpoint.target, key=endpoint.key, deadline=10.0) as mesh:
        told = mesh.explain(**asked)
    if arguments.json:
        sys.stdout.write(MessageToJson(told, preserving_proto_field_name=True) + "\n")
    else:
        show(told, open_console())
    return 0


def show(told: pb.ExplainRouteResponse, console: Console) -> None:
    """For people: the outcome, then each stage's reasons."""
    for refusal in told.refusals:
        when = f"; again in {refusal.retry_after_seconds:.1f} s" if refusal.HasField("retry_after_seconds") else ""
        console.print(f"[bold red]refused[/] by {refusal.stage}: {refusal.reason}, {escape(refusal.message)}{when}")
    if not told.refusals:
        console.print(f"[green]would run[/] on {escape(told.routing.replica)}, model {escape(told.routing.model)}")
    table = plain_table("", "")
    for name, value in _facts(told):
        table.add_row(name, escape(value))
    console.print(table)
    if told.limits:
        console.print(_limits(told))
    if told.routing.considered:
        console.print(_candidates(told.routing))


def _facts(told: pb.ExplainRouteResponse) -> Iterator[tuple[str, str]]:
    priority = generation_pb2.Priority.Name(told.priority).removeprefix("PRIORITY_").lower()
    yield "caller", f"key {told.key_id}, tenant {told.tenant}, priority {priority}"
    if told.regions:
        yield "regions", told.regions
    yield "tokens", f"about {told.prompt_tokens} of input, at most {told.completion_tokens} of answer"
    if told.HasField("most_cost_micros"):
        yield "price", f"at most {told.most_cost_micros / _MICROS:.6f}"
    if told.HasField("admission"):
        yield "risk", _risk(told.admission)
    for step in told.routing.steps:
        yield step.stage, f"{step.outcome}{f' ({step.model})' if step.model else ''}"
    if told.routing.model:
        arm = f", arm {told.routing.arm}" if told.routing.arm else ""
        yield "model", f"{told.routing.model} ({told.routing.model_reason or 'named'}{arm})"
        yield "replica", f"{told.routing.replica} in {told.routing.region or 'no region'} ({told.routing.reason})"
    if told.HasField("queue_seconds"):
        yield "queue", f"no worker has room now; about {told.queue_seconds:.1f} s, as far as is known"
    if told.cache:
        yield "cache", told.cache
    if told.guard_policy:
        yield "guard", f"policy {told.guard_policy} (not asked)"


def _risk(admission: pb.Admission) -> str:
    told = f"{admission.risk:.2f}, counts {admission.weight:.1f} times towards limits"
    if admission.HasField("surprise"):
        told += f"; surprise {admission.surprise:.1f} ({admission.surprise_source})"
    if admission.shadow:
        told += f"; in shadow, or it would count {admission.shadow_weight:.1f} times"
    return told


def _limits(told: pb.ExplainRouteResponse) -> object:
    table = plain_table("limit", "of", "model", "left", "of all")
    for limit in told.limits:
        left = str(limit.left) if limit.HasField("left") else "?"
        table.add_row(limit.limit, f"{limit.holder} {limit.holder_id}", limit.model or "all", left, str(limit.amount))
    return table


def _candidates(routing: pb.RoutingDecision) -> object:
    table = plain_table("replica", "region", "first token", "cached", "load", "weight", "left out")
    for candidate in routing.considered:
        name = escape(candidate.replica) or "(not told)"
        if candidate.excluded:
            table.add_row(name, candidate.region, "", "", "", "", candidate.excluded, style="dim")
            continue
        seconds = f"{candidate.predicted_seconds * 1000:.0f} ms"
        figures = (str(candidate.cached_tokens), str(candidate.load), f"{candidate.weight:.2f}")
        table.add_row(name, candidate.region, seconds, *figures, "")
    return table
