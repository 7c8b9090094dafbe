"""Times every Triton kernel of moe_dist beside the torch path it would replace, on one GPU.

    python benchmarks/kernels_gpu.py [--preset olmoe,qwen3-30b-a3b,sonicmoe-7b] [--shape T,H,F,E,k]... [--json FILE]

bfloat16 rows and weights, float32 router. Before anything is timed, the results of all paths are compared; a path that
differs from the first is not timed. Rounds are interleaved (A B C, A B C, ...) and timed by CUDA events, behind a wait that
keeps the GPU busy until the host has launched everything: what is measured is the device, as in a CUDA graph. The first
call, in which triton tries out configurations and torch compiles, is not timed. `of torch` is the time relative to the
fastest torch path; a kernel belongs into a layer only where it is below 1.

Without a GPU there is nothing to time: the exit code is 2.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from common import choice_of, describe_run, headline, new_parser, parse_shape, summary, version, write_json
from peers import PRESETS, Shape
from torch import Tensor

from moe_dist.kernels import why_not

if TYPE_CHECKING:
    from kernel_cases import Case

DEFAULT_PRESETS = ["olmoe", "qwen3-30b-a3b", "sonicmoe-7b"]
TOLERANCE = 3e-2
WARM_UP_ROUNDS = 3
WAIT_CYCLES = 2_000_000
"""About a millisecond, longer than the host takes to launch a step."""


def main() -> None:
    options = parse_options()
    if not torch.cuda.is_available() or (reason := why_not()):
        print(f"no kernel was timed: {reason if torch.cuda.is_available() else 'torch sees no GPU'}", file=sys.stderr)
        sys.exit(2)
    from kernel_cases import cases

    device = torch.device("cuda", torch.cuda.current_device())
    report = describe_run("kernels", gpu=torch.cuda.get_device_name(), triton=version("triton"), dtype="bfloat16")
    report |= {"rounds": options.rounds, "shapes": []}
    print(f"{report['gpu']}, triton {report['triton']}\n{headline(report)}")
    for shape in shapes(options):
        found = {"shape": asdict(shape), "cases": []}
        report["shapes"].append(found)
        print("\n{tokens} tokens, H {hidden}, F {ffn}, E {experts}, k {top_k}".format(**asdict(shape)))
        print(f"{'':18}{'':16}{'median ms':>10}{'min ms':>10}{'of torch':>10}{'TFLOP/s':>10}")
        for case in cases(shape, device, torch.bfloat16):
            found["cases"].append(measure(case, lambda steps: time_rounds(steps, options.rounds)))
            print(table(found["cases"][-1]), flush=True)
    write_json(options.json, report)


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--preset", type=choice_of(PRESETS), metavar="NAME,...", help=f"default {','.join(DEFAULT_PRESETS)}"
    )
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="T,H,F,E,k", help="beside presets")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds")
    return parser.parse_args()


def shapes(options: argparse.Namespace) -> list[Shape]:
    names = options.preset or ([] if options.shape else DEFAULT_PRESETS)
    return [shape for name in names for shape in PRESETS[name]] + (options.shape or [])


def measure(case: "Case", time: Callable[[dict[str, Callable[[], object]]], dict[str, list[float]]]) -> dict:
    """Compare the paths of one case with its first, then time those that agree."""
    expected = next(iter(case.rows.values()))()
    errors = {name: relative_error(row(), expected) for name, row in case.rows.items()}
    seconds = time({name: row for name, row in case.rows.items() if errors[name] <= TOLERANCE})
    rows = {name: summary(values) for name, values in seconds.items()}
    *torch_rows, _ours = case.rows
    fastest = min(rows[name]["median_ms"] for name in torch_rows if name in rows)
    for row in rows.values():
        row["of_torch"] = row["median_ms"] / fastest
        row["tflops"] = 1e-9 * case.flops / row["median_ms"]
    return {"case": case.name, "rows": rows, "differing": {n: e for n, e in errors.items() if not e <= TOLERANCE}}


def relative_error(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference over the largest value, of any of the tensors; infinity for what is not a number."""
    errors = [
        (x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-30)
        for x, y in zip(found, expected, strict=True)
    ]
    return torch.stack(errors).nan_to_num(nan=torch.inf).max().item()


def time_rounds(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round on the GPU."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-WARM_UP_ROUNDS, rounds):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(WAIT_CYCLES)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 0:
                seconds[name].append(1e-3 * start.elapsed_time(end))
    return seconds


def table(result: dict) -> str:
    """The rows of one case as text."""
    lines = []
    for place, (name, row) in enumerate(result["rows"].items()):
        case = "" if place else result["case"]
        tflops = f"{row['tflops']:10.0f}" if row["tflops"] else ""
        lines.append(f"{case:18}{name:16}{row['median_ms']:10.3f}{row['min_ms']:10.3f}{row['of_torch']:10.2f}{tflops}")
    for name, error in result["differing"].items():
        lines.append(f"{result['case']:18}{name:16}DIFFERS by {error:.1e}, not timed")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
