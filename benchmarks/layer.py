"""Times one MoE layer, forward and backward, beside its peers and beside the limit of the machine, on CPU with gloo.

    python benchmarks/layer.py [--ranks 2] [--rounds 20] [--shape T,H,F,E,k]... [--peers NAME,...] [--json FILE]

float32, dropless, learned top-k router included, SwiGLU experts without biases, expert parallelism over all ranks.
moe_dist is installed or on PYTHONPATH; the peers are megatron-core 0.16.1 and deepspeed 0.19.8, and one that cannot be
imported is left out.

All layers have the same weights and tokens and live in the same processes. Before anything is timed, their outputs and
gradients are compared with a plain loop; a layer that differs is not timed. Rounds are interleaved (A B C, A B C, ...),
each step starts at a barrier, and its time is that of the slowest rank. `limit` is the same expert FLOPs as balanced
GEMMs into buffers that exist already (the faster of a loop of mm and of bmm) plus, on several ranks, four bare
all-to-alls of the rows (dispatch and combine, forward and backward). All processes keep freed memory (raised malloc
thresholds), which every layer gains from; --default-malloc leaves glibc as it is.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from peers import COMPETITORS, Competitor, Limit, Problem, Shape, UnavailableError, loads, make_problem, reference
from torch import Tensor

PRESETS = [Shape(4096, 256, 512, 8, 2), Shape(4096, 256, 128, 64, 4)]
TOLERANCE = 1e-4
WARM_UP_ROUNDS = 3
SQUARE_GEMM = 2048

Step = tuple[Callable[[], object], Callable[[], object]]
"""What is done before the clock starts, and what is timed."""


def main() -> None:
    options = parse_options()
    set_environment(options)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (options, f"{folder}/store"), nprocs=options.ranks)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes, each with cores // ranks threads")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds")
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="T,H,F,E,k", help="not the presets")
    parser.add_argument("--peers", type=parse_peers, default=list(COMPETITORS), help=",".join(COMPETITORS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    parser.add_argument("--default-malloc", action="store_true", help="leave glibc's allocator settings alone")
    options = parser.parse_args()
    options.shape = options.shape or PRESETS
    for shape in options.shape:
        if problem := what_is_wrong(shape, options.ranks):
            parser.error(f"{shape}: {problem}")
    return options


def parse_shape(text: str) -> Shape:
    try:
        return Shape(*(int(number) for number in text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not five numbers T,H,F,E,k") from None


def parse_peers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(COMPETITORS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(COMPETITORS)}")
    return names


def what_is_wrong(shape: Shape, ranks: int) -> str | None:
    """Why a shape cannot be measured, if so."""
    if shape.experts % ranks:
        return f"{shape.experts} experts cannot be spread over {ranks} ranks"
    if not 2 <= shape.top_k <= shape.experts:
        return "k must be at least 2 (with one expert the peers weight differently) and at most E"
    if shape.tokens * shape.top_k * ranks % shape.experts:
        return "T * k * ranks must be a multiple of E, so that a perfect balance exists"
    return None


def set_environment(options: argparse.Namespace) -> None:
    """What the ranks find in their environment when they start: glibc reads its settings only then."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONWARNINGS"] = "ignore"  # the peers warn of every optional package that is absent
    if not options.default_malloc:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(1 << 36)


def worker(rank: int, options: argparse.Namespace, store: str) -> None:
    """One rank: measure every shape; rank 0 prints and writes."""
    torch.set_num_threads(max(1, cores() // options.ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    square = torch.randn(SQUARE_GEMM, SQUARE_GEMM)
    product = torch.empty_like(square)
    seconds = time_rounds({"square": (nothing, lambda: torch.mm(square, square, out=product))}, rounds=5)["square"]
    report = describe_run(options) | {"square_gflops": 2e-9 * SQUARE_GEMM**3 / seconds.median().item(), "shapes": []}
    if rank == 0:
        print(headline(report))
    for shape in options.shape:
        result = measure(make_problem(shape, rank, options.ranks), options)
        report["shapes"].append(result)
        if rank == 0:
            print(table(result), flush=True)
    if rank == 0 and options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    dist.destroy_process_group()


def measure(problem: Problem, options: argparse.Namespace) -> dict:
    """Compare, then time, all layers on one problem."""
    layers, left_out, differing = build_layers(problem, options.peers)
    limit = Limit(problem)
    steps: dict[str, Step] = {name: (nothing, part) for name, part in limit.parts().items()}
    steps |= {name: (layer.clear, layer.step) for name, layer in layers.items()}
    seconds = time_rounds(steps, options.rounds)
    gemms = min("loop of mm", "bmm", key=lambda name: seconds[name].median())
    seconds = {"limit": seconds[gemms] + seconds.get("all-to-all", 0)} | seconds
    load_E = loads(problem).double()
    load_of_ranks = load_E.view(problem.ranks, -1).sum(dim=1)
    return {
        "shape": asdict(problem.shape),
        "heaviest_expert": (load_E.max() / load_E.mean()).item(),
        "heaviest_rank": (load_of_ranks.max() / load_of_ranks.mean()).item(),
        "gemms": gemms,
        "gemm_gflops": 1e-9 * problem.shape.flops() / seconds[gemms].median().item(),
        "rows": {name: summary(row, seconds["limit"]) for name, row in seconds.items()},
        "left_out": left_out,
        "differing": differing,
    }


def build_layers(problem: Problem, names: list[str]) -> tuple[dict[str, Competitor], dict[str, str], dict[str, dict]]:
    """The layers that can be imported and agree with the reference, and why the others are not among them."""
    layers, left_out, differing = {}, {}, {}
    expected = reference(problem)
    for name in names:
        try:
            layer = COMPETITORS[name](problem)
        except (ImportError, UnavailableError) as error:
            left_out[name] = str(error)
            continue
        errors = relative_errors(layer.results(), expected)
        if max(errors.values()) <= TOLERANCE:
            layers[name] = layer
        else:
            differing[name] = errors
    return layers, left_out, differing


def relative_errors(results: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over the largest value, on the worst rank; infinity for what is not a number."""
    errors = [(results[name] - value).abs().max() / value.abs().max() for name, value in expected.items()]
    worst = torch.stack(errors).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(expected, worst.tolist(), strict=True))


def time_rounds(steps: dict[str, Step], rounds: int) -> dict[str, Tensor]:
    """Seconds of every step in every round, on its slowest rank."""
    seconds = torch.zeros(len(steps), rounds, dtype=torch.float64)
    for round_ in range(-WARM_UP_ROUNDS, rounds):
        for row, (prepare, step) in zip(seconds, steps.values(), strict=True):
            prepare()
            dist.barrier()
            start = time.perf_counter()
            step()
            elapsed = time.perf_counter() - start
            if round_ >= 0:
                row[round_] = elapsed
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return dict(zip(steps, seconds, strict=True))


def nothing() -> None:
    """The preparation of steps that need none."""


def summary(seconds: Tensor, limit: Tensor) -> dict:
    """What is kept of one row."""
    return {
        "median_ms": 1e3 * seconds.median().item(),
        "min_ms": 1e3 * seconds.min().item(),
        "median_of_limit": (seconds.median() / limit.median()).item(),
        "min_of_limit": (seconds.min() / limit.min()).item(),
        "rounds_ms": [round(1e3 * value, 3) for value in seconds.tolist()],
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_run(options: argparse.Namespace) -> dict:
    """Everything that a reader of the numbers has to know."""
    return {
        "benchmark": "layer",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_name(), "cores": cores(), "system": platform.platform()},
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "moe_dist", "megatron-core", "deepspeed")},
        "dtype": "float32",
        "ranks": options.ranks,
        "threads_per_rank": torch.get_num_threads(),
        "rounds": options.rounds,
        "malloc": "default" if options.default_malloc else "keeps freed memory",
    }


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def cpu_name() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(package: str) -> str | None:
    """The installed version of a package, if any."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def headline(report: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    return (
        f"{report['machine']['cpu']}, ranks: {report['ranks']}, threads a rank: {report['threads_per_rank']}, "
        f"{report['dtype']}, malloc: {report['malloc']}, {report['rounds']} rounds\n{versions}\n"
        f"square GEMM of {SQUARE_GEMM}: {report['square_gflops']:.0f} GFLOP/s a rank"
    )


def table(result: dict) -> str:
    """One shape as text."""
    shape, rows = result["shape"], result["rows"]
    lines = [
        "",
        "{tokens} tokens a rank, H {hidden}, F {ffn}, E {experts}, k {top_k}; ".format(**shape)
        + f"heaviest expert {result['heaviest_expert']:.2f} x mean, heaviest rank {result['heaviest_rank']:.2f} x mean",
        f"limit: GEMMs by {result['gemms']} at {result['gemm_gflops']:.0f} GFLOP/s a rank",
        f"{'':16}{'median ms':>10}{'min ms':>10}{'x limit':>10}{'x limit (min)':>15}",
    ]
    for name, row in rows.items():
        lines.append(
            f"{name:16}{row['median_ms']:10.1f}{row['min_ms']:10.1f}"
            f"{row['median_of_limit']:10.2f}{row['min_of_limit']:15.2f}"
        )
    lines += [f"{name}: left out ({reason})" for name, reason in result["left_out"].items()]
    for name, errors in result["differing"].items():
        wrong = ", ".join(f"{what} by {error:.1e}" for what, error in errors.items() if not error <= TOLERANCE)
        lines.append(f"{name}: DIFFERS from the reference, not timed ({wrong})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
