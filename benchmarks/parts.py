"""Measures where a step of our layer spends its time: in products, in what surrounds them, and between calls.

    python benchmarks/parts.py [--shape T,H,F,E,k]... [--rounds 10] [--json FILE]

One rank on a CPU, float32 and bfloat16, dropless, forward and backward, learned top-k router included. torch's profiler says
how long each operator took, without those that it calls; the parts below add up to the whole step. Looking costs time, most where
operators are short: `step` is the median of steps that nobody looks at, `profiled` the mean of those that are looked at, and
the parts are shares of the latter. `limit` is what benchmarks/layer.py calls so.

    products      all GEMMs, the router's too
    activation    elementwise operators and sums: SwiGLU, its backward, weights and their gradients
    rows          rows fetched, put together and added up
    plan          softmax, top-k, sorting, and the indices of slots and blocks
    calls         the rest: Python, autograd, new tensors and views
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict
from statistics import median

import torch
from common import (
    MALLOCS,
    describe_run,
    headline,
    new_parser,
    nothing,
    parse_shape,
    run_ranks,
    set_environment,
    time_rounds,
    write_json,
)
from peers import COMPETITORS, PRESETS, Limit, Shape, make_problem
from torch.profiler import ProfilerActivity, profile, schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPERATORS = {
    "products": ("mm", "bmm", "addmm", "_linear_pointwise"),
    "activation": ("silu", "silu_backward", "mul", "mul_", "sum", "add", "add_"),
    "rows": ("index_select", "_embedding_bag", "_embedding_bag_forward_only", "cat", "copy_"),
    "plan": (
        *("_softmax", "_softmax_backward_data", "topk", "sort", "searchsorted", "cumsum", "bincount", "arange"),
        *("repeat_interleave", "index", "index_copy_", "gather", "scatter", "scatter_", "fill_"),
    ),
}
PARTS = (*OPERATORS, "calls")
PART_OF = {operator: part for part, operators in OPERATORS.items() for operator in operators}


def main() -> None:
    options = parse_options()
    set_environment(MALLOCS[1])
    report = describe_run("parts", device="cpu", malloc=MALLOCS[1], rounds=options.rounds, results=[])
    print(headline(report))
    print(f"\n{'':42}{'limit ms':>10}{'step ms':>10}{'profiled':>10}" + "".join(f"{part:>12}" for part in PARTS))
    for dtype in DTYPES:
        for shape in options.shape:
            report["results"].append(run_ranks(1, measure, shape, dtype, options.rounds))
            print(line(report["results"][-1]), flush=True)
    write_json(options.json, report)


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="T,H,F,E,k", help="not the preset `cpu`")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    options.shape = options.shape or PRESETS["cpu"]
    return options


def measure(shape: Shape, dtype: str, rounds: int) -> dict:
    """One line of the table."""
    problem = make_problem(shape, 0, 1, dtype=DTYPES[dtype])
    layer = COMPETITORS["moe_dist"](problem)

    def step() -> None:
        layer.run_forward()
        layer.run_backward()

    gemms = Limit(problem).gemms()
    steps = {name: (nothing, lambda ways=ways: [way() for way in ways]) for name, ways in gemms.items()}
    seconds = time_rounds({**steps, "step": (layer.clear, step)}, rounds)
    step_ms = 1e3 * median(seconds.pop("step"))
    with profile(activities=[ProfilerActivity.CPU], schedule=schedule(wait=0, warmup=1, active=rounds)) as profiler:
        for round_ in range(1 + rounds):
            if round_ > 0:
                profiler.step()
            if round_ == 1:
                start = time.perf_counter()
            layer.clear()
            step()
        elapsed = time.perf_counter() - start
    operators = ((event.key, 1e-6 * event.self_cpu_time_total) for event in profiler.key_averages())
    return {
        "shape": asdict(shape),
        "dtype": dtype,
        "limit_ms": 1e3 * min(map(median, seconds.values())),
        "step_ms": step_ms,
        "profiled_ms": 1e3 * elapsed / rounds,
        "shares": shares(operators, elapsed),
    }


def shares(operators: Iterable[tuple[str, float]], elapsed: float) -> dict[str, float]:
    """Each part's share of the seconds elapsed, from operators and their own seconds. What no operator took is `calls`."""
    seconds = dict.fromkeys(OPERATORS, 0.0)
    for name, own in operators:
        if part := PART_OF.get(name.rpartition("::")[2]):
            seconds[part] += own
    return {part: value / elapsed for part, value in seconds.items()} | {"calls": 1 - sum(seconds.values()) / elapsed}


def line(result: dict) -> str:
    """One shape and dtype as text."""
    times = "".join(f"{result[key]:10.1f}" for key in ("limit_ms", "step_ms", "profiled_ms"))
    name = "{tokens}, {hidden}, {ffn}, {experts}, {top_k}".format(**result["shape"])
    return f"{name + ' ' + result['dtype']:42}{times}" + "".join(f"{result['shares'][part]:12.1%}" for part in PARTS)


if __name__ == "__main__":
    main()
