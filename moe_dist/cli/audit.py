"""`moe-dist audit`: what the routing of a token depends on, by experiment."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from moe_dist.cli.arguments import ConfigFile, Overrides
from moe_dist.config import Config, load_config
from moe_dist.config.layout import moe_layers

if TYPE_CHECKING:
    from moe_dist.routing.audit import Finding, Findings

Processes = Annotated[
    int,
    typer.Option(
        "--ranks",
        metavar="N",
        min=1,
        help="Processes on this machine, each with tokens of its own. With 1, a dependence on other ranks is not tried.",
    ),
]


def audit(config: ConfigFile, overrides: Overrides = None, ranks: Processes = 2) -> None:
    """Try whether the routing of a token depends on later tokens, other sequences or other ranks.

    Exit code 1 means that the documentation of the method says something else than was found.
    """
    checked = load_config(config, overrides)
    from moe_dist.routing.audit import LATER  # imports torch
    from moe_dist.training import audit as experiment

    findings = experiment.audit(checked, ranks)
    problems = experiment.contradictions(checked.routing, checked.moe.num_experts, findings)
    console = Console(markup=False, highlight=False)
    console.print(_table(checked, findings))
    leaks = [
        *_leak(checked, findings.training[LATER], "training"),
        *_leak(checked, findings.evaluation[LATER], "evaluation"),
    ]
    for line in (*leaks, *(f"This is a bug: {problem}" for problem in problems)):
        console.print(line, soft_wrap=True)
    raise typer.Exit(1 if problems else 0)


def _table(config: Config, findings: "Findings") -> Table:
    table = Table(
        title=f"What the routing of a token depends on (routing.method: {config.routing.method})",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 1, 0),
    )
    for heading in ("", "training", "evaluation"):
        table.add_column(heading, overflow="fold")
    for question, finding in findings.training.items():
        table.add_row(question, _answer(finding), _answer(findings.evaluation[question]))
    table.add_row("does evaluation route as training does?", "", _agreement(findings))
    return table


def _answer(finding: "Finding | None") -> str:
    if finding is None:
        return "not tried"
    if not finding.examples:
        return "no"
    share = len(finding.examples) / len(finding.trials)
    return f"yes ({share:.0%} of {len(finding.trials)} trials; first: {finding.examples[0]})"


def _agreement(findings: "Findings") -> str:
    weights = "" if findings.equal_weights else "weights differ"
    if findings.equal_choices == 1:
        return f"yes, but {weights}" if weights else "yes"
    return f"no ({findings.equal_choices:.1%} of the choices are equal{weights and '; '}{weights})"


def _leak(config: Config, finding: "Finding | None", mode: str) -> Iterator[str]:
    """The bound of `leaked_bits`, rounded up; and what the paper estimates for expert choice."""
    from moe_dist.routing.audit import leaked_bits

    assert finding is not None
    routing, num_experts, layers = config.routing, config.moe.num_experts, len(moe_layers(config))
    outputs = num_experts + (routing.zero_experts.count if routing.zero_experts else 0)
    bits = leaked_bits(finding, outputs, routing.top_k)
    start = f"What routing in {mode} tells of later tokens:"
    if math.isinf(bits):
        yield f"{start} no bound, because weights change with them"
        return
    yield f"{start} at most {_rounded_up(bits)} bits a token and layer, {_rounded_up(bits * layers)} in {layers} MoE layers"
    share = routing.top_k / num_experts
    if bits and routing.method == "expert_choice" and share < 0.5:
        least = routing.top_k * math.log2((1 - share) / share)
        yield f"  (arXiv 2408.15664 estimates more than {least:.2f} bits a token and layer for expert choice)"


def _rounded_up(bits: float) -> str:
    return f"{math.ceil(100 * bits - 1e-9) / 100:g}"
