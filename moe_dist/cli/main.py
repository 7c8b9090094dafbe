"""The command `moe-dist`.

Commands import what is heavy (torch) when they run, so that a wrong config or option is told at once.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moe_dist.cli import audit as audit_command
from moe_dist.cli import compare as compare_command
from moe_dist.cli import config as config_command
from moe_dist.cli import report as report_command
from moe_dist.cli import watch as watch_command
from moe_dist.cli.arguments import ConfigFile, Overrides, Ranks, positive
from moe_dist.config import ConfigError, load_config
from moe_dist.config.support import require_package, require_sinks
from moe_dist.config.verification import load_reference, parse_engines, parse_layout
from moe_dist.parallel.environment import read_environment
from moe_dist.training.documents import check_documents
from moe_dist.training.folder import default_output, open_folder

LocalRank = Annotated[
    int | None,
    typer.Option("--local_rank", "--local-rank", hidden=True, help="Added by launchers; LOCAL_RANK says the same."),
]


class Commands(TyperGroup):
    """Tells every mistake of a user in one message on stderr, and ends with exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and exit."""
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except ConfigError as error:
            _fail(str(error))
        except typer.TyperException as error:
            _fail(f"{error.format_message()} (moe-dist --help tells more)")
        sys.exit(code)


def _fail(message: str) -> None:
    lines = message.splitlines()
    separator = " " if len(lines) == 1 else "\n  "
    print(f"moe-dist: error:{separator}{separator.join(lines)}", file=sys.stderr)
    sys.exit(2)


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)
app.command("config")(config_command.config)
app.command("audit")(audit_command.audit)
app.command("compare")(compare_command.compare)
app.command("report")(report_command.report)
app.command("watch")(watch_command.watch)


@app.callback(invoke_without_command=True)
def moe_dist(context: typer.Context, local_rank: LocalRank = None) -> None:
    """Train mixture-of-experts language models across expert-parallel ranks."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Ranks = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Where the results go. Default: a new one in runs/.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
    local_rank: LocalRank = None,
) -> None:
    """Train the model of CONFIG: as a worker under torchrun or deepspeed, otherwise on N ranks of this machine."""
    overrides, environment = overrides or [], read_environment()
    if environment.launcher != "single":
        if ranks not in (None, environment.num_ranks):
            raise ConfigError(
                f"--ranks: {ranks} is not valid; the launcher started {environment.num_ranks} ranks, so leave it out"
            )
        ranks = environment.num_ranks
    checked = load_config(config, overrides, ranks)
    if resume and output is None:
        raise ConfigError("--resume: needs --output DIR, the folder of the run to go on with")
    require_package(checked.engine.name, checked.parallel.tensor)
    require_sinks(checked.telemetry)
    if environment.launcher == "single":
        check_documents(checked)
        output = output or default_output(config)
        open_folder(output, checked, resume)
    from moe_dist.cli.train import train as run  # imports torch

    raise typer.Exit(run(config, overrides, ranks, output, resume))


@app.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            parser=positive,
            help="Number of ranks. Default: all GPUs, or 2; at least what CONFIG needs.",
        ),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option("--engines", metavar="NAMES", help="Such as native,megatron. Default: all of this version."),
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            "--layouts",
            metavar="LAYOUTS",
            help="Such as 'data expert=2 expert=2,expert_tensor=2'. Default: those of a few sizes that each engine offers.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Steps of each row.")] = 20,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="Where verify.json and the states of the reference go; shared by all nodes."
        ),
    ] = None,
    local_rank: LocalRank = None,
) -> None:
    """Try whether every engine and layout trains CONFIG as one rank does: weights, losses, all gradients, loads.

    Ends with exit code 1 if one does not.
    """
    names, tried = parse_engines(engines), layouts.split() if layouts else None
    for layout in tried or ():
        parse_layout(layout)
    if engines and read_environment().launcher == "single":
        for name in names:  # of those that nobody named, the table says why they are not run
            require_package(name)
    checked = load_reference(config, overrides or [], steps)
    check_documents(checked)
    from moe_dist.cli.verify import Request, run  # imports torch

    raise typer.Exit(run(Request(config, overrides or [], steps, names, tried, output), ranks))


@app.command("hash-table")
def hash_table(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="Where the table goes, an .npz file.")],
    overrides: Overrides = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--embeddings",
            metavar="DIR",
            help="A run whose embeddings tell which tokens are similar. Default: their neighbours in the text do.",
        ),
    ] = None,
) -> None:
    """Make the table of routing.method: hash from the training text of CONFIG."""
    checked = load_config(config, overrides)
    check_documents(checked)
    from moe_dist.cli.hash_table import make  # imports torch

    make(checked, output, embeddings)


@app.command()
def analyse(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run with checkpoints.")],
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="Held-out tokens to route.")] = 16384,
) -> None:
    """Tell which experts of a finished run go together, for which tokens, and since which checkpoint."""
    from moe_dist.cli.analyse import run as analyse_run  # imports torch

    analyse_run(run, tokens)
