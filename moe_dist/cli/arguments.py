"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as those in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, such as parallel.expert=2 or routing.bias={}."),
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", metavar="N", min=1, help="Number of ranks. Default: the fewest that `parallel` needs."),
]
