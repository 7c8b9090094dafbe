"""`moe-dist report`: the records of one run, or of several side by side, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.config import ConfigError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of runs, finished or not.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Default: DIR/report.html; of several runs, report.html here."),
    ] = None,
) -> None:
    """Show what runs did in one HTML file that opens offline: balance, cost and quality, side by side if there are several."""
    output = output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if not output.parent.is_dir():
        raise ConfigError(f"--output: {str(output)!r} cannot be written: there is no folder {str(output.parent)!r}")
    from moe_dist.telemetry.report import write_report  # imports pandas

    try:
        write_report(runs, output)
    except ValueError as error:
        raise ConfigError(f"DIR: {error}") from None
    except OSError as error:
        raise ConfigError(f"{str(error.filename)!r}: {error.strerror}") from None
    print(f"report in {output}")
