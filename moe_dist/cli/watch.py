"""`moe-dist watch`: a run on the terminal, while it goes on and after."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moe_dist.config import ConfigError
from moe_dist.telemetry.watch import Watched
from moe_dist.telemetry.watch_screen import follow, picture


def watch(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")],
    once: Annotated[
        bool, typer.Option("--once", help="Print one picture and end. Default where the output is no terminal.")
    ] = False,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", min=0.1, help="Between two looks.")] = 1.0,
) -> None:
    """Show load, ranks, MaxVio, speed and alarms of a running or finished run."""
    if not any((run / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"DIR: {str(run)!r} holds no config.yaml and no metrics.jsonl, so no run")
    watched, console = Watched(run), Console()
    if console.is_terminal and not once:
        follow(watched, seconds)
    else:
        watched.update()
        console.print(picture(watched, console.width))
