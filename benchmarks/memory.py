"""Measures the memory that a stack of MoE layers needs, forward and backward, beside its peers.

    python benchmarks/memory.py [--shape T,H,F,E,k]... [--rows NAME,...] [--layers 4] [--repeats 3] [--json FILE]

float32, dropless, one rank, learned top-k router included; each layer adds to the residual stream: x + layer(x). Every
figure comes from a fresh process, which does two steps on the same tokens, so that workspaces kept between steps count.
Rows take turns; medians of the repeats. Memory is that of the process: on a CPU what Linux says is resident (VmHWM, its
peak, starts anew before the steps), on cuda what torch's allocator has given out. Everything is above what there was
before the layers were built, when libraries were loaded and tiny stacks had been run. A CPU is measured under glibc's
malloc as it is and under raised thresholds, where freed memory stays with the process. A row whose output or input
gradient differs from the first row's is not counted.

    peak        weights, their gradients, activations and workspaces
    activation  the same without the weights: above what there was when the layers had been built
    saved       bytes that the graph of one layer saves for backward, each storage counted once, without parameters
    held        bytes by which the process has grown for one layer between forward and backward, however they are held

On cuda: not run on hardware.
"""

import argparse
import contextlib
import ctypes
import gc
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from common import (
    MALLOCS,
    choice_of,
    describe_run,
    headline,
    new_parser,
    parse_shape,
    run_ranks,
    set_environment,
    write_json,
)
from peers import COMPETITORS, Competitor, Problem, Shape, UnavailableError, make_problem
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SHAPES = [Shape(4096, 512, 256, 64, 6), Shape(4096, 256, 128, 64, 4)]
ROWS = ["moe_dist", "megatron", "megatron_grouped", "megatron_allgather", "deepspeed", "hf_grouped_mm", "torchtitan"]
WARM_UP = [Shape(16, 32, 32, 8, 2), Shape(24, 48, 40, 8, 2)]  # at the second torch.compile compiles for all shapes
STEPS = 2
KINDS = ("peak", "activation", "saved", "held")
NORMS = ("output norm", "gradient norm")
PEER = "megatron"
TOLERANCE = 1e-3  # of norms: of near-equal scores another may win in a later layer


def main() -> None:
    options = parse_options()
    report = describe_run(
        "memory", dtype="float32", device=options.device, layers=options.layers, steps=STEPS, shapes=[]
    )
    print(headline(report))
    for shape in options.shape:
        for malloc in MALLOCS if options.device == "cpu" else MALLOCS[:1]:
            result = measure(shape, malloc, options)
            report["shapes"].append(result)
            print(table(result, options.layers), flush=True)
    write_json(options.json, report)


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="T,H,F,E,k", help="not the two presets")
    names = choice_of(COMPETITORS)
    parser.add_argument("--rows", type=names, default=ROWS, metavar="NAME,...", help=",".join(COMPETITORS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes for each figure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    options.shape = options.shape or SHAPES
    return options


def measure(shape: Shape, malloc: str, options: argparse.Namespace) -> dict:
    """All rows of one shape under one allocator setting."""
    repeats: dict[str, list[dict]] = {name: [] for name in options.rows}
    left_out: dict[str, str] = {}
    set_environment(malloc, options.device)
    for _ in range(options.repeats):
        for name in repeats.keys() - left_out.keys():
            found = run_ranks(1, measure_stack, name, shape, options.layers, options.device)
            if "left out" in found:
                left_out[name] = found["left out"]
            else:
                repeats[name].append(found)
    rows = {
        name: {key: median(one[key] for one in found) for key in (*KINDS, *NORMS)}
        for name, found in repeats.items()
        if found
    }
    return {
        "shape": asdict(shape),
        "malloc": malloc,
        "rows": rows,
        "repeats": {name: repeats[name] for name in rows},
        "left_out": left_out,
        "differing": differing(rows),
    }


def differing(rows: dict[str, dict]) -> list[str]:
    """Rows that do not compute what the first one does."""
    first = next(iter(rows.values()), {})
    return [
        name
        for name, row in rows.items()
        if not all(abs(row[norm] - first[norm]) <= TOLERANCE * first[norm] for norm in NORMS)
    ]


def measure_stack(name: str, shape: Shape, num_layers: int, device: str) -> dict:
    """What a fresh process does for one figure."""
    try:
        for warm_up in WARM_UP:
            problem = make_problem(warm_up, 0, 1, device=device)
            train(build_stack(name, problem, 1), problem)
    except (ImportError, UnavailableError) as error:
        return {"left out": str(error)}
    problem = make_problem(shape, 0, 1, device=device)
    before = settled_memory(device)
    stack = build_stack(name, problem, num_layers)
    weights = settled_memory(device)
    reset_peak(device)
    for _ in range(STEPS):
        norms = train(stack, problem)
    peak = peak_memory(device)
    saved, held = forward_memory(stack, problem, device)
    return {"peak": peak - before, "activation": peak - weights, "saved": saved, "held": held, **norms}


def build_stack(name: str, problem: Problem, num_layers: int) -> list[Competitor]:
    """Layers of equal weights."""
    stack = [COMPETITORS[name](problem) for _ in range(num_layers)]
    for layer in stack:
        layer.hidden_TH = None  # its own copy of the tokens
    return stack


def train(stack: list[Competitor], problem: Problem) -> dict[str, float]:
    """One step; the norms of output and input gradient."""
    hidden_TH = problem.hidden_TH.detach().requires_grad_()
    for layer in stack:
        layer.layer.zero_grad(set_to_none=True)
    output_TH = forward(stack, hidden_TH)
    output_TH.backward(problem.grad_TH)
    return dict(zip(NORMS, (output_TH.norm().item(), hidden_TH.grad.norm().item()), strict=True))


def forward(stack: Iterable[Competitor], hidden_TH: Tensor) -> Tensor:
    for layer in stack:
        hidden_TH = hidden_TH + layer.forward(hidden_TH)
    return hidden_TH


def forward_memory(stack: list[Competitor], problem: Problem, device: str) -> tuple[float, float]:
    """Per layer: bytes that the graph saves, and bytes by which the process grows in a forward."""
    for layer in stack:
        layer.layer.zero_grad(set_to_none=True)
    before = settled_memory(device)
    parameters = {p.untyped_storage().data_ptr() for layer in stack for p in layer.layer.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(count, lambda tensor: tensor):
        output_TH = forward(stack, problem.hidden_TH.detach().requires_grad_())
    held = settled_memory(device) - before
    output_TH.backward(problem.grad_TH)  # until here the graph is alive
    total = sum(size for address, size in saved.items() if address not in parameters)
    return total / len(stack), held / len(stack)


def settled_memory(device: str) -> int:
    """Bytes in use when everything that is free has been given back."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def reset_peak(device: str) -> None:
    """Let the peak start from here. Where Linux forbids it, it is that of the whole process, which the steps exceed."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    """Bytes, from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def table(result: dict, num_layers: int) -> str:
    """One shape under one allocator setting as text."""
    counted = {name: row for name, row in result["rows"].items() if name not in result["differing"]}
    lines = [
        "",
        "{tokens} tokens, H {hidden}, F {ffn}, E {experts}, k {top_k}; ".format(**result["shape"])
        + f"{num_layers} layers, malloc: {result['malloc']}; MB, and the ratio to {PEER}",
        f"{'':16}" + "".join(f"{kind:>12}{'ratio':>7}" for kind in KINDS),
    ]
    for name, row in counted.items():
        cells = (f"{row[kind] / 1e6:12.1f}{ratio(row[kind], counted.get(PEER, {}).get(kind)):>7}" for kind in KINDS)
        lines.append(f"{name:16}" + "".join(cells))
    lines += [f"{name}: DIFFERS from {next(iter(counted))}, not counted" for name in result["differing"]]
    lines += [f"{name}: left out ({reason})" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def ratio(value: float, reference: float | None) -> str:
    return f"{value / reference:.2f}" if reference else "-"


if __name__ == "__main__":
    main()
