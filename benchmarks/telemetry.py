"""What the records of a run cost: the quickstart with and without them, in turns.

    python benchmarks/telemetry.py [--ranks 2] [--rounds 12] [--json FILE]

Two trainings of configs/quickstart.yaml in the same processes: one with all records at their default interval, one with
telemetry.interval: null. They take turns of as many steps as a line has; the time of a turn with records ends when its line is on
disk, so that nothing of the thread beside training falls into the turn of the other. Printed are the time inside the recorder's
calls on the training thread over the time of the steps, from the records themselves, and of both kinds of turns the median
times a step: by the clock, and of the processor for all threads of rank 0, which other processes disturb less. With as many ranks
as cores the thread has no core of its own, and its work counts in full.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from common import describe_run, headline, new_parser, run_ranks, set_environment, write_json

from moe_dist.config import layout_of, load_config
from moe_dist.telemetry.records import read_records
from moe_dist.training.data import TextData
from moe_dist.training.folder import RunFolder
from moe_dist.training.loop import Training

CONFIG = Path(__file__).parents[1] / "configs/quickstart.yaml"
PLAIN = ["training.evaluation.interval=null", "training.checkpoint.interval=null"]
STEPS = 10
"""Of a turn: those of a line, telemetry.interval of the quickstart."""
KINDS: dict[str, list[str]] = {"with records": [], "without": ["telemetry.interval=null"]}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks, over which the experts are spread")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the quickstart")
    options = parser.parse_args()
    set_environment("keeps freed memory")
    overrides = [*PLAIN, f"parallel.expert={options.ranks}", *options.overrides]
    found = run_ranks(options.ranks, measure, overrides, options.rounds)
    report = describe_run("telemetry", ranks=options.ranks, overrides=options.overrides, **found)
    print(headline(report))
    print(table(found))
    write_json(options.json, report)


def measure(overrides: list[str], rounds: int) -> dict[str, Any]:
    """What `take_turn` gives of every turn, and the recorder's share of the seconds of every line and rank."""
    with tempfile.TemporaryDirectory() as folder:
        trainings = {kind: build([*overrides, *more], Path(folder, kind)) for kind, more in KINDS.items()}
        turns: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        with trainings["with records"].telemetry:
            for round_ in range(-1, rounds):  # the first is not counted
                for kind in KINDS if round_ % 2 else reversed(KINDS):
                    elapsed = take_turn(trainings[kind])
                    if round_ >= 0:
                        turns[kind].append(elapsed)
        lines = list(read_records(trainings["with records"].folder.load_records(dist.get_rank())))[1:]
    shares: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, [line["recorder_seconds"] / line["seconds"] for line in lines])
    return {"turns": turns, "recorder_share": [share for of_rank in shares for share in of_rank]}


def build(overrides: list[str], folder: Path) -> Training:
    place = [str(folder)]
    dist.broadcast_object_list(place)  # all ranks write beside rank 0
    num_ranks = dist.get_world_size()
    config = load_config(CONFIG, overrides, num_ranks)
    return Training(
        config, layout_of(config, num_ranks), torch.device("cpu"), TextData(config), RunFolder(Path(place[0]), None)
    )


def take_turn(training: Training) -> tuple[float, float]:
    """Seconds a step by the clock on the slowest rank, and of the processor on this one."""
    dist.barrier()
    began, began_cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        training.step()
    training.telemetry.flush()
    elapsed, of_processor = torch.tensor(time.perf_counter() - began), time.process_time() - began_cpu
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return elapsed.item() / STEPS, of_processor / STEPS


def table(found: dict[str, Any]) -> str:
    medians = {kind: [median(column) for column in zip(*turns, strict=True)] for kind, turns in found["turns"].items()}
    ratios = [on / off for on, off in zip(*medians.values(), strict=True)]
    shares = found["recorder_share"]
    return "\n".join(
        [
            "| ms a step, median | by the clock | of the processor |",
            "|---|---|---|",
            *(f"| {kind} | {1e3 * clock:.1f} | {1e3 * cpu:.1f} |" for kind, (clock, cpu) in medians.items()),
            f"| ratio | {ratios[0]:.3f} | {ratios[1]:.3f} |",
            "",
            f"inside the recorder's calls: median {median(shares):.2%} of a step, at most {max(shares):.2%}",
        ]
    )


if __name__ == "__main__":
    main()
