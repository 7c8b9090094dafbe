"""`moe-dist audit`: what the routing of a token depends on, by experiment."""

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from moe_dist.cli.arguments import ConfigFile, Overrides, positive
from moe_dist.config import Config, load_config
from moe_dist.config.layout import moe_layers

if TYPE_CHECKING:
    from moe_dist.routing.audit import Finding, Findings

Processes = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        metavar="N",
        parser=positive,
        help="Processes on this machine, each with tokens of its own. Default: 2. With 1, other ranks are not tried.",
    ),
]


def audit(config: ConfigFile, overrides: Overrides = None, ranks: Processes = None) -> None:
    """Try whether the routing of a token depends on later tokens, other sequences or other ranks.

    Ends with exit code 1 if the documentation of the method says something else than was found.
    """
    checked = load_config(config, overrides)
    from moe_dist.training import audit as experiment  # imports torch

    findings = experiment.audit(checked, ranks or 2)
    problems = experiment.contradictions(checked.routing, checked.moe.num_experts, findings)
    console = Console(markup=False, highlight=False)
    console.print(f"What the routing of a token depends on, with routing.method: {checked.routing.method}\n")
    console.print(_table(findings))
    for line in (*_leaks(checked, findings), *(f"This is a bug: {problem}" for problem in problems)):
        console.print(line, soft_wrap=True)
    raise typer.Exit(1 if problems else 0)


def _table(findings: "Findings") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for heading in ("", "training", "evaluation"):
        table.add_column(heading, overflow="fold")
    for question, finding in findings.training.items():
        table.add_row(question, _answer(finding), _answer(findings.evaluation[question]))
    table.add_row("evaluation routes as training does", "", _agreement(findings))
    return table


def _answer(finding: "Finding | None") -> str:
    if finding is None:
        return "not tried"
    if not finding.examples:
        return "no"
    share = len(finding.examples) / len(finding.trials)
    return f"yes ({share:.0%} of {len(finding.trials)} trials; first: {finding.examples[0]})"


def _agreement(findings: "Findings") -> str:
    weights = "" if findings.equal_weights else "; weights differ"
    if findings.equal_choices < 1:
        return f"no ({findings.equal_choices:.1%} of the choices are equal{weights})"
    return f"yes{weights}"


def _leaks(config: Config, findings: "Findings") -> list[str]:
    """The bounds of `leaked_bits`, rounded up; and what the paper estimates for expert choice."""
    from moe_dist.routing.audit import LATER, leaked_bits

    routing, num_experts, layers = config.routing, config.moe.num_experts, len(moe_layers(config))
    outputs = num_experts + (routing.zero_experts.count if routing.zero_experts else 0)
    lines = []
    for mode, answers in (("training", findings.training), ("evaluation", findings.evaluation)):
        finding = answers[LATER]
        assert finding is not None
        bits = leaked_bits(finding, outputs, routing.top_k)
        amount = (
            f"at most {_rounded_up(bits)} bits a token and layer, {_rounded_up(bits * layers)} in {layers} MoE layers"
        )
        lines.append(f"What it tells of later tokens in {mode}: {amount if bits else '0 bits'}")
    share = routing.top_k / num_experts
    if routing.method == "expert_choice" and share < 0.5:
        estimate = routing.top_k * math.log2((1 - share) / share)
        lines.append(f"arXiv 2408.15664 estimates more than {estimate:.2f} bits a token and layer for expert choice")
    return lines


def _rounded_up(bits: float) -> str:
    return "any number of" if math.isinf(bits) else f"{math.ceil(100 * bits - 1e-9) / 100:g}"
