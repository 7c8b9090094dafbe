"""Times one MoE layer, forward and backward, beside its peers and beside the limit of the machine.

    python benchmarks/layer.py [--preset NAME,...] [--ranks 2] [--dtype bfloat16] [--load zipf] [--device cuda]
        [--shape T,H,F,E,k]... [--tokens T] [--peers NAME,...] [--rounds 20] [--json FILE]

Dropless, learned top-k router included, SwiGLU experts without biases, expert parallelism over all ranks. moe_dist is
installed or on PYTHONPATH, the peers as in benchmarks/requirements.txt; one that cannot run here is left out, with the
reason. Under bfloat16 the parameters and tokens of every layer are bfloat16, without autocast, and so is the limit.

All layers have the same weights and tokens and live in the same processes. Before anything is timed, their outputs and
gradients are compared with a plain loop in float32; a layer that differs is not timed. Tokens whose choice of experts
would hang on rounding are drawn again. Rounds are interleaved (A B C, A B C, ...), each step starts at a barrier, and
its time is that of the slowest rank; on a GPU it is measured by CUDA events. The FLOP/s of its forward and its backward
count the experts' GEMMs only. All processes keep freed memory (raised malloc thresholds), which every layer gains from;
--default-malloc leaves glibc as it is.

`limit` is the same expert FLOPs as balanced GEMMs without activation, into buffers that exist already (on CPU the faster
of a loop of mm and of bmm, on a GPU of torch's grouped_mm and bmm) plus, on several ranks, four bare all-to-alls of the
rows (dispatch and combine, forward and backward). With --load zipf on several ranks, `heaviest` is those GEMMs times the
heaviest rank's share of the rows, plus the all-to-alls of the rows as they are routed. --device cuda: not run on hardware.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from common import (
    choice_of,
    cores,
    describe_run,
    headline,
    nothing,
    parse_shape,
    relative_errors,
    set_environment,
    summary,
    write_json,
)
from layer_tables import overview, run_line, table
from peers import (
    COMPETITORS,
    EXCHANGE,
    EXCHANGE_AS_ROUTED,
    LOADS,
    PRESETS,
    Competitor,
    Limit,
    Problem,
    Shape,
    UnavailableError,
    loads,
    make_problem,
    reference,
)
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
WARM_UP_ROUNDS = 3
SQUARE_GEMM = {"cpu": 1024, "cuda": 8192}
TOTAL = 2  # of forward, backward, total


class Step(NamedTuple):
    """What is done before the clock starts, and the two parts that are timed."""

    prepare: Callable[[], object]
    forward: Callable[[], object]
    backward: Callable[[], object]


def main() -> None:
    options = parse_options()
    set_environment("default" if options.default_malloc else "keeps freed memory")
    os.environ["DS_ACCELERATOR"] = options.device
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (options, f"{folder}/store"), nprocs=options.ranks)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets, peers = list(PRESETS), list(COMPETITORS)
    parser.add_argument(
        "--preset", type=choice_of(presets), metavar="NAME,...", help=f"default cpu; {','.join(presets)}"
    )
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="T,H,F,E,k", help="beside or without presets"
    )
    parser.add_argument("--tokens", type=int, help="tokens a rank, instead of the shapes' own")
    parser.add_argument("--load", choices=LOADS, default="uniform", help="zipf: expert i in proportion to 1 / (i + 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of parameters and tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=1, help="processes, each with cores // ranks threads or one GPU")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    parser.add_argument("--peers", type=choice_of(peers), default=peers, metavar="NAME,...", help=",".join(peers))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's allocator settings alone")
    options = parser.parse_args()
    names = options.preset or ([] if options.shape else ["cpu"])
    options.shape = [shape for name in names for shape in PRESETS[name]] + (options.shape or [])
    if options.tokens:
        options.shape = [replace(shape, tokens=options.tokens) for shape in options.shape]
    for shape in options.shape:
        if problem := what_is_wrong(shape, options.ranks):
            parser.error(f"{shape}: {problem}")
    return options


def what_is_wrong(shape: Shape, ranks: int) -> str | None:
    """Why a shape cannot be measured, if so."""
    if shape.experts % ranks:
        return f"{shape.experts} experts cannot be spread over {ranks} ranks"
    if not 2 <= shape.top_k <= shape.experts:
        return "k must be at least 2 (with one expert the peers weight differently) and at most E"
    if shape.tokens * shape.top_k * ranks % shape.experts:
        return "T * k * ranks must be a multiple of E, so that a perfect balance exists"
    return None


def worker(rank: int, options: argparse.Namespace, store: str) -> None:
    """One rank: measure every shape; rank 0 prints and writes."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // options.ranks))
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    report = describe_run(
        "layer",
        device=options.device if device.type == "cpu" else torch.cuda.get_device_name(device),
        dtype=options.dtype,
        load=options.load,
        ranks=options.ranks,
        threads_per_rank=torch.get_num_threads(),
        rounds=options.rounds,
        malloc="default" if options.default_malloc else "keeps freed memory",
        tolerance=TOLERANCE[options.dtype],
        square_gemm=square_gemm(DTYPES[options.dtype], device),
        shapes=[],
    )
    if rank == 0:
        print(headline(report))
        print(run_line(report))
    for shape in options.shape:
        problem = make_problem(shape, rank, options.ranks, options.load, DTYPES[options.dtype], device)
        result = measure(problem, options)
        report["shapes"].append(result)
        if rank == 0:
            print(table(result, report), flush=True)
        gc.collect()  # the layers of this shape
    if rank == 0:
        print(f"\n{overview(report)}")
        write_json(options.json, report)
    dist.destroy_process_group()


def square_gemm(dtype: torch.dtype, device: torch.device) -> dict:
    """What the limit's FLOP/s are held against."""
    size = SQUARE_GEMM[device.type]
    square = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(square)
    steps = {"square": Step(nothing, partial(torch.mm, square, square, out=product), nothing)}
    seconds = time_rounds(steps, 5, device)["square"]
    return {"size": size, "flops_per_second": 2 * size**3 / median_of(seconds[TOTAL])}


def measure(problem: Problem, options: argparse.Namespace) -> dict:
    """Compare, then time, all layers on one problem."""
    layers, left_out, errors = build_layers(problem, options.peers)
    same = [name for name in layers if max(errors[name].values()) <= TOLERANCE[options.dtype]]
    limit = Limit(problem)
    gemms = limit.gemms()
    passes = gemms | limit.exchanges(as_routed=options.load == "zipf")
    steps = {name: Step(nothing, *both) for name, both in passes.items()}
    for name in same:
        steps[name] = Step(layers[name].clear, layers[name].run_forward, layers[name].run_backward)
    seconds = time_rounds(steps, options.rounds, problem.device)
    load_E = loads(problem).double()
    load_of_ranks = load_E.view(problem.ranks, -1).sum(dim=1)
    heaviest_rank = (load_of_ranks.max() / load_of_ranks.mean()).item()
    fastest = min(gemms, key=lambda name: median_of(seconds[name][TOTAL]))
    bounds = {"limit": seconds[fastest] + seconds.get(EXCHANGE, 0)}
    if EXCHANGE_AS_ROUTED in seconds:
        bounds["heaviest"] = heaviest_rank * seconds[fastest] + seconds[EXCHANGE_AS_ROUTED]
    return {
        "shape": asdict(problem.shape),
        "heaviest_expert": (load_E.max() / load_E.mean()).item(),
        "heaviest_rank": heaviest_rank,
        "gemms": fastest,
        "gemm_flops_per_second": problem.shape.flops() / median_of(seconds[fastest][TOTAL]),
        "rows": {name: describe_row(row, bounds, problem.shape) for name, row in (bounds | seconds).items()},
        "left_out": left_out,
        "differing": [name for name in layers if name not in same],
        "largest_differences": errors,
    }


def build_layers(
    problem: Problem, names: list[str]
) -> tuple[dict[str, Competitor], dict[str, str], dict[str, dict[str, float]]]:
    """The layers that run here, why the others do not, and how far each that runs is from the reference."""
    layers, left_out, errors = {}, {}, {}
    expected = reference(problem)
    for name in names:
        try:
            layers[name] = COMPETITORS[name](problem)
            results = layers[name].results()
        except (ImportError, UnavailableError, ValueError, torch.OutOfMemoryError) as error:
            layers.pop(name, None)
            left_out[name] = str(error).splitlines()[0]
            continue
        errors[name] = relative_errors(results, expected)
    return layers, left_out, errors


def time_rounds(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, Tensor]:
    """Seconds of every step in every round, each on its slowest rank: [forward, backward and total, rounds]."""
    seconds = torch.zeros(len(steps), 3, rounds, dtype=torch.float64)
    for round_ in range(-WARM_UP_ROUNDS, rounds):
        for row, step in zip(seconds, steps.values(), strict=True):
            step.prepare()
            dist.barrier()
            forward, backward = time_on_gpu(step) if device.type == "cuda" else time_on_cpu(step)
            if round_ >= 0:
                row[:, round_] = torch.tensor([forward, backward, forward + backward])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return dict(zip(steps, seconds, strict=True))


def time_on_cpu(step: Step) -> tuple[float, float]:
    start = time.perf_counter()
    step.forward()
    middle = time.perf_counter()
    step.backward()
    return middle - start, time.perf_counter() - middle


def time_on_gpu(step: Step) -> tuple[float, float]:
    torch.cuda.synchronize()
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    step.forward()
    middle.record()
    step.backward()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(middle), 1e-3 * middle.elapsed_time(end)


def median_of(seconds: Tensor) -> float:
    return median(seconds.tolist())


def describe_row(seconds: Tensor, bounds: dict[str, Tensor], shape: Shape) -> dict:
    """What is kept of one row."""
    forward, backward, total = seconds
    row = summary(total.tolist())
    for name, bound in bounds.items():
        row[f"median_of_{name}"] = median_of(total) / median_of(bound[TOTAL])
        row[f"min_of_{name}"] = (total.min() / bound[TOTAL].min()).item()
    row["forward_flops_per_second"] = shape.flops() / 3 / median_of(forward)
    row["backward_flops_per_second"] = shape.flops() * 2 / 3 / median_of(backward)
    return row


if __name__ == "__main__":
    main()
