"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not valid; it should be an integer greater than 0")
    return int(text)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, such as those in configs/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it, such as parallel.expert=2 or routing.bias={}."),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--ranks",
        metavar="N",
        parser=positive,
        help="Number of ranks. Default: the fewest that `parallel` needs; with GPUs, `train` uses all of them.",
    ),
]
