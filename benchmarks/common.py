"""What several benchmarks share: processes, options, interleaved rounds, and what a reader of the numbers has to know."""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from peers import Shape

WARM_UP_ROUNDS = 2
MALLOCS = ("default", "keeps freed memory")
MALLOC_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

Step = tuple[Callable[[], object], Callable[[], object]]
"""What is done before the clock starts, and what is timed."""


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """With the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    return parser


def parse_shape(text: str) -> Shape:
    """T,H,F,E,k."""
    try:
        return Shape(*(int(number) for number in text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not five numbers T,H,F,E,k") from None


def choice_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of NAME,NAME,... that knows the names."""
    known = list(known)

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return parse


def set_environment(malloc: str, device: str = "cpu") -> None:
    """What processes find in their environment when they start: glibc reads its settings only then."""
    os.environ["DS_ACCELERATOR"] = device
    os.environ["PYTHONWARNINGS"] = "ignore"  # the peers warn of every optional package that is absent
    # With threads beside OpenMP's own (those of a process group), libgomp lets its threads sleep between operations, which
    # makes small ones several times slower, in every layer alike. A setting of the user stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000000")
    for name in MALLOC_SETTINGS:
        os.environ.pop(name, None)
        if malloc != "default":
            os.environ[name] = str(1 << 36)


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns on rank 0 (made of what JSON knows), run on all ranks of a group of fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (ranks, folder, function, arguments), nprocs=ranks)
        return json.loads(Path(folder, "result").read_text())


def _run_rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    result = function(*arguments)
    if rank == 0:
        Path(folder, "result").write_text(json.dumps(result))
    dist.destroy_process_group()


def time_rounds(
    steps: dict[Any, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, list[float]]:
    """Seconds of every step in every round (A B C, A B C, ...), each started at a barrier, on its slowest rank."""
    seconds = torch.zeros(len(steps), rounds, dtype=torch.float64)
    for round_ in range(-WARM_UP_ROUNDS, rounds):
        for row, (prepare, step) in zip(seconds, steps.values(), strict=True):
            prepare()
            dist.barrier()
            start = clock()
            step()
            elapsed = clock() - start
            if round_ >= 0:
                row[round_] = elapsed
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return dict(zip(steps, seconds.tolist(), strict=True))


def nothing() -> None:
    """The preparation of steps that need none."""


def summary(seconds: list[float]) -> dict:
    """What is kept of one row."""
    return {
        "median_ms": 1e3 * median(seconds),
        "min_ms": 1e3 * min(seconds),
        "rounds_ms": [round(1e3 * value, 4) for value in seconds],
    }


def relative_errors(results: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference over the largest value, on the worst rank; infinity for what is not a number."""
    errors = [(results[name] - value).abs().max() / value.abs().max() for name, value in expected.items()]
    worst = torch.stack(errors).nan_to_num(nan=torch.inf)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(expected, worst.tolist(), strict=True))


def describe_run(benchmark: str, **details: Any) -> dict:
    """Machine, versions and commit, with what is particular to the benchmark."""
    packages = ("torch", "moe_dist", "megatron-core", "deepspeed", "transformers", "torchtitan")
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {"cpu": cpu_name(), "cores": cores(), "system": platform.platform()},
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
        **details,
    }


def headline(report: dict) -> str:
    """The first lines of what is printed."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items() if number)
    return f"{report['machine']['cpu']}, {report['machine']['cores']} cores; commit {report['commit']}\n{versions}"


def write_json(file: Path | None, report: dict) -> None:
    """Everything measured, if a file is asked for."""
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if files other than results differ from it; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "..", ":(exclude)results")
    return f"{commit}-dirty" if commit and changed else commit or None


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


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
