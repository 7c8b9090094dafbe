"""`moe-dist analyse`: what the routers of a finished run do on held-out text."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.parallel.environment import read_environment
from moe_dist.parallel.groups import process_group
from moe_dist.training.analysis import analyse, config_of_run, write_analysis


def run(folder: Path, num_tokens: int) -> None:
    """Print a row for each MoE layer, and write all numbers to DIR/routing.json."""
    config = config_of_run(folder)
    with process_group(read_environment()) as device:
        result = analyse(folder, config, num_tokens, device)
    console = Console(markup=False)
    console.print(f"after step {result['step']}, on {result['tokens']:,} held-out tokens")
    console.print(_table(result))
    console.print(f"all pairs, tokens and steps in {write_analysis(folder, result)}", soft_wrap=True)


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    headings = ["layer", "MaxVio", "most often together", "specialisation"]
    saturated = sorted({step for layer in result["layers"].values() for step in layer["saturation"]}, key=int)
    for heading in (*headings, *(f"as after step {step}" for step in saturated)):
        table.add_column(heading, justify="right", overflow="fold")
    for number, layer in result["layers"].items():
        ids = sum(layer["ids"])
        mean = sum(m * n for m, n in zip(layer["specialisation"], layer["ids"], strict=True)) / max(1, ids)
        cells = [number, f"{layer['max_vio']:.3f}", _closest_pair(layer["coactivation"]), f"{mean:.2f}"]
        table.add_row(*cells, *(f"{layer['saturation'][step]:.1%}" for step in saturated))
    return table


def _closest_pair(rate_EE: list[list[float]]) -> str:
    """The expert whose tokens most often use another one too, and how often."""
    rate, i, j = max(
        ((rate, i, j) for i, row in enumerate(rate_EE) for j, rate in enumerate(row) if i != j), default=(0, 0, 0)
    )
    return f"{i} with {j}: {rate:.0%}"
