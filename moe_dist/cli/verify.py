"""`moe-dist verify`: does every engine and layout train this config as one rank does?

Under a launcher its ranks do the work; otherwise it starts ranks on this machine, which come here again.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from rich.console import Console

from moe_dist.cli.ranks import as_rank, check_same_text, launch
from moe_dist.cli.verify_table import as_record, conclude, show
from moe_dist.config import Config, ConfigError, load_config
from moe_dist.config.layout import fewest_ranks
from moe_dist.config.verification import load_cases, load_reference, rows_of
from moe_dist.parallel.environment import Environment, read_environment
from moe_dist.parallel.groups import process_group
from moe_dist.parallel.memory import keep_freed_memory
from moe_dist.training.data import TextData
from moe_dist.training.verification import run_reference, verify

ALONE = Environment(0, 1, 0, 1, "127.0.0.1", 0, "single")


@dataclass(frozen=True)
class Request:
    """The arguments of the command."""

    path: Path
    overrides: list[str]
    num_steps: int
    engines: list[str]
    layouts: list[str] | None
    output: Path | None

    def arguments(self) -> list[str]:
        """As the command line has them."""
        words = ["-m", "moe_dist", "verify", str(self.path), *self.overrides, "--steps", str(self.num_steps)]
        words += ["--engines", ",".join(self.engines)]
        words += ["--layouts", " ".join(self.layouts)] if self.layouts else []
        return [*words, "--output", str(self.output)] if self.output else words


def run(request: Request, num_ranks: int | None) -> int:
    """Run the command; returns the exit code. Raises ConfigError for a mistake found before anything has started."""
    environment = read_environment()
    if environment.launcher == "single":
        config = load_config(request.path, request.overrides)
        return launch(num_ranks or max(2, fewest_ranks(config), torch.cuda.device_count()), request.arguments())
    if num_ranks not in (None, environment.num_ranks):
        raise ConfigError(
            f"--ranks: {num_ranks} is not valid; the launcher started {environment.num_ranks} ranks, so leave it out"
        )
    if request.output is None and environment.num_ranks > environment.local_num_ranks:
        raise ConfigError("--output: needed on several nodes: a folder on storage that all of them share")
    return as_rank(environment, lambda: _verify_rank(request, environment))


def _verify_rank(request: Request, environment: Environment) -> int:
    keep_freed_memory()
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(
        logging.ERROR
    )  # speed of gathering, which is rare
    is_first, num_ranks = environment.rank == 0, environment.num_ranks
    console = Console(highlight=False, markup=False, quiet=not is_first)
    config = load_config(request.path, request.overrides)
    reference_config = load_reference(request.path, request.overrides, request.num_steps)
    rows = rows_of(config, num_ranks, request.engines, request.layouts, torch.cuda.is_available())
    cases = load_cases(request.path, request.overrides, request.num_steps, num_ranks, rows)
    data, reference = TextData(reference_config), None
    with TemporaryDirectory(prefix="moe_dist_verify_") as temporary:
        states = [str((request.output or Path(temporary)) / "states")]
        if is_first:
            shutil.rmtree(states[0], ignore_errors=True)
            console.print(_introduction(config, reference_config, num_ranks), soft_wrap=True)
            with process_group(ALONE) as device:
                reference = run_reference(reference_config, device, data, Path(states[0]))
        with process_group(environment) as device:
            dist.broadcast_object_list(states, src=0)
            check_same_text(data.digest)
            outcomes = verify(
                cases,
                reference,
                device,
                data,
                Path(states[0]),
                lambda case: console.print(str(case.row), soft_wrap=True),
            )
            dist.barrier()  # the temporary folder of rank 0 is there until all have read it
    if is_first:
        if request.output:
            records = [as_record(outcome) for outcome in outcomes]
            (request.output / "verify.json").write_text(json.dumps(records, indent=1))
        show(outcomes)
        conclude(outcomes)
    return 0


def _introduction(config: Config, reference: Config, num_ranks: int) -> str:
    precision, wanted = reference.training.precision, config.training.precision
    instead = "" if precision == wanted else f" (training.precision: {wanted} rounds too coarsely to compare)"
    return (
        f"{reference.training.steps} steps in {precision}{instead}, constant learning rate; {num_ranks} ranks beside the "
        "reference\nreference: native, one rank"
    )
