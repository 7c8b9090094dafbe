"""Times the journey of tokens to their experts and back, without experts, forward and backward, on CPU with gloo.

    python benchmarks/dispatch.py [--ranks 2] [--nodes 1] [--load uniform,zipf] [--shape T,H,F,E,k]... [--rows NAME,...]
        [--rounds 20] [--json FILE]

Rows do the same: from tokens and the experts and weights of each, which are there already, to the weighted sum of the
rows that come back, and the gradients of tokens and weights. (Megatron applies weights inside its experts: here by one
product of rows and weights.) Before anything is timed, output and gradients are compared with arithmetic, where each expert
multiplies by a number of its own; a row that differs is not timed. Rounds are interleaved, each step starts at a barrier,
and its time is that of the slowest rank. F plays no part.

`all-to-all` is the least that a flat exchange does: four bare all-to-alls of the routed rows between buffers that exist
already. `plain torch` is what one writes first: a sort, index_select, all-to-all and index_add. MB are what a rank gives
to the other ranks in one step, the mean over ranks, counted where torch calls a collective; what is gathered is given to
every rank. `between nodes` are those that leave its node: blocks of ranks / nodes consecutive ranks, all on this machine.

Loads: `uniform` chooses k experts at random, `zipf` in proportion to 1 / i for the i-th most popular expert.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from common import (
    MALLOCS,
    Step,
    choice_of,
    describe_run,
    headline,
    new_parser,
    nothing,
    parse_shape,
    relative_errors,
    run_ranks,
    set_environment,
    summary,
    time_rounds,
    write_json,
)
from journeys import JOURNEYS, ZIPF_EXPONENT, Journey, Load, checked_results, draw_load, expected_results
from peers import Shape, UnavailableError
from torch.utils._python_dispatch import TorchDispatchMode

SHAPES = [Shape(4096, 256, 512, 8, 2), Shape(4096, 512, 256, 64, 6)]
TOLERANCE = 1e-5


def main() -> None:
    options = parse_options()
    set_environment(MALLOCS[1])
    details = {key: getattr(options, key) for key in ("ranks", "nodes", "rounds")}
    report = describe_run("dispatch", dtype="float32", malloc=MALLOCS[1], **details, results=[])
    print(headline(report))
    for shape in options.shape:
        for load in options.load:
            result = run_ranks(options.ranks, measure, shape, load, options.nodes, options.rows, options.rounds)
            report["results"].append(result)
            print(table(result, options), flush=True)
    write_json(options.json, report)


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes, each with cores // ranks threads")
    parser.add_argument("--nodes", type=int, default=1, help="blocks of consecutive ranks that count as nodes")
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="T,H,F,E,k", help="not the two presets")
    loads = list(ZIPF_EXPONENT)
    parser.add_argument("--load", type=choice_of(loads), default=loads, metavar="NAME,...", help=",".join(loads))
    rows = list(JOURNEYS)
    parser.add_argument("--rows", type=choice_of(rows), default=rows, metavar="NAME,...", help=",".join(rows))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    options.shape = options.shape or SHAPES
    if options.ranks < 2 or options.ranks % options.nodes:
        parser.error("--ranks must be at least 2, and a multiple of --nodes")
    for shape in options.shape:
        if shape.experts % options.ranks or not 2 <= shape.top_k <= shape.experts:
            parser.error(f"{shape}: E must be a multiple of --ranks, and k between 2 and E")
    return options


def measure(shape: Shape, load_name: str, nodes: int, rows: list[str], rounds: int) -> dict:
    """Compare, then time, all journeys of one load; on every rank."""
    load = draw_load(shape, load_name, nodes)
    bare, bare_bytes = bare_exchange(load)
    steps: dict[str, Step] = {"all-to-all": (nothing, bare)}
    given, left_out, differing = {"all-to-all": bare_bytes}, {}, {}
    for name in rows:
        try:
            journey = JOURNEYS[name](load)
        except (ImportError, UnavailableError) as error:
            left_out[name] = str(error)
            continue
        with CountBytes() as counted:
            results = checked_results(journey, load)
        errors = relative_errors(results, expected_results(load))
        if max(errors.values()) <= TOLERANCE:
            steps[name], given[name] = timed_step(journey, load), counted.given_to
        else:
            differing[name] = errors
    seconds = time_rounds(steps, rounds)
    pairs_of_rank = exchanged_counts(load)[1]
    return {
        "shape": asdict(shape),
        "load": load_name,
        "heaviest_rank": max(pairs_of_rank) / (sum(pairs_of_rank) / load.ranks),
        "rows": {name: summary(seconds[name]) | mean_bytes(given[name], nodes) for name in steps},
        "left_out": left_out,
        "differing": differing,
    }


def exchanged_counts(load: Load) -> tuple[list[int], list[int]]:
    """Rows that this rank gives each rank, and rows that each rank has in the end."""
    send = (load.expert_TK // load.num_local).flatten().bincount(minlength=load.ranks)
    total = send.clone()
    dist.all_reduce(total)
    return send.tolist(), total.tolist()


def bare_exchange(load: Load) -> tuple[Callable[[], None], list[int]]:
    """There and back, forward and backward; and the bytes that this gives each rank."""
    send, _ = exchanged_counts(load)
    received = torch.empty(load.ranks, dtype=torch.int64)
    dist.all_to_all_single(received, torch.tensor(send))
    receive = received.tolist()
    rows, there = torch.randn(sum(send), load.shape.hidden), torch.empty(sum(receive), load.shape.hidden)

    def step() -> None:
        for _ in ("forward", "backward"):
            dist.all_to_all_single(there, rows, receive, send)
            dist.all_to_all_single(rows, there, send, receive)

    with CountBytes() as counted:
        step()
    return step, counted.given_to


def timed_step(journey: Journey, load: Load) -> Step:
    """With experts that return what they get."""
    hidden_TH = load.hidden_TH.clone().requires_grad_()

    def clear() -> None:
        hidden_TH.grad = journey.weight.grad = None

    def step() -> None:
        journey.run(hidden_TH, journey.weight, lambda rows_RH, sizes, places: rows_RH).backward(load.grad_TH)

    return clear, step


class CountBytes(TorchDispatchMode):
    """Adds up what this rank's collectives give each rank of the default group, itself included."""

    def __init__(self) -> None:
        super().__init__()
        self.given_to = [0] * dist.get_world_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[2]))
            for rank, size in zip(ranks, given(func.__name__.split(".")[0], args, len(ranks)), strict=True):
                self.given_to[rank] += size
        return func(*args, **(kwargs or {}))


def given(collective: str, args: Any, ranks: int) -> list[int]:
    """Bytes for each rank of the group, by what torch's operator is called and takes."""
    data = args[1]
    if collective == "alltoall_base_":
        splits = args[4] or [len(data) // ranks] * ranks
        return [size * data[:1].nbytes for size in splits]
    return [{"_allgather_base_": data.nbytes, "_reduce_scatter_base_": data.nbytes // ranks}[collective]] * ranks


def mean_bytes(given_to: list[int], nodes: int) -> dict[str, float]:
    """Means over ranks of what leaves a rank, and of what leaves its node."""
    rank, per_node = dist.get_rank(), dist.get_world_size() // nodes
    others = sum(given_to) - given_to[rank]
    first = rank // per_node * per_node
    elsewhere = sum(given_to) - sum(given_to[first : first + per_node])
    total = torch.tensor([others, elsewhere], dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(("bytes", "bytes_between_nodes"), (total / dist.get_world_size()).tolist(), strict=True))


def table(result: dict, options: argparse.Namespace) -> str:
    """One shape and load as text."""
    bare = result["rows"]["all-to-all"]
    lines = [
        "",
        "{tokens} tokens a rank, H {hidden}, E {experts}, k {top_k}; ".format(**result["shape"])
        + f"{result['load']}, heaviest rank {result['heaviest_rank']:.2f} x mean; {options.ranks} ranks, {options.nodes} nodes",
        f"{'':24}{'median ms':>10}{'min ms':>10}{'x bare':>8}{'x (min)':>8}{'MB sent':>10}{'between nodes':>15}",
    ]
    for name, row in result["rows"].items():
        ratios = f"{row['median_ms'] / bare['median_ms']:8.2f}{row['min_ms'] / bare['min_ms']:8.2f}"
        traffic = f"{row['bytes'] / 1e6:10.1f}{row['bytes_between_nodes'] / 1e6:15.1f}"
        lines.append(f"{name:24}{row['median_ms']:10.1f}{row['min_ms']:10.1f}{ratios}{traffic}")
    lines += [f"{name}: left out ({reason})" for name, reason in result["left_out"].items()]
    for name, errors in result["differing"].items():
        wrong = ", ".join(f"{what} by {error:.1e}" for what, error in errors.items() if not error <= TOLERANCE)
        lines.append(f"{name}: DIFFERS from arithmetic, not timed ({wrong})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
