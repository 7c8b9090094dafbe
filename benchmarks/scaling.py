"""Measures how the cost per token of one MoE layer grows with its experts, k, tokens and expert-parallel ranks.

    python benchmarks/scaling.py [--sweep experts,top_k,tokens,ranks] [--shape T,H,F,E,k] [--rounds 10] [--json FILE]

float32, dropless, forward and backward, learned top-k router included. Each sweep changes one number of the shape and
leaves the others, so that `experts` has constant active FLOPs. `us/token` is the time of a step (of the slowest rank)
over the tokens of a rank, `growth` is relative to the sweep's first row, and `limit` is what benchmarks/layer.py calls
so: the same FLOPs as balanced GEMMs into buffers that exist already, and four bare all-to-alls. All points of a sweep
live in the same processes and take turns. A layer that differs from the plain loop is not timed.

`ranks` has two tables. Real gloo processes share the cores of this machine. Then, by torch's fake process group, one rank
of up to 1,024 is run alone: what it costs the host to plan, count, slice and call (CPU time of the process), with rows too
small to matter. Fake collectives bring nothing; here the rank receives what it would if all ranks held its tokens, exactly
balanced.
`dispatch` is dispatch and combine forward, `layer` the whole layer forward and backward; `hierarchical` has nodes of 8.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from statistics import median
from unittest import mock

import torch
import torch.distributed as dist
from common import (
    MALLOCS,
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
from peers import COMPETITORS, Limit, Shape, UnavailableError, make_problem, reference
from torch import Tensor

from moe_dist import MoELayer
from moe_dist.config import MoEConfig, RoutingConfig
from moe_dist.dispatch.hierarchical import HierarchicalExchange
from moe_dist.parallel.groups import NodeGroups
from moe_dist.placement import ExpertMap
from moe_dist.routing import Routing, Tokens

BASE = Shape(4096, 256, 128, 64, 4)
ROWS = ("moe_dist", "megatron")
PARTS = ("gemms", "exchange", "layer")
TOLERANCE = 1e-4
REAL_RANKS = (1, 2, 4)
FAKE_RANKS = (1, 8, 64, 256, 1024)
FAKE_EXPERTS = (1024, 4096)
FAKE_WIDTH, FAKE_TOP_K = 8, 2
FAKE_NODE = 8
# Both methods give every expert equally many rows.
FAKE_PATHS = {"dropless": "force_balanced", "static": "expert_choice", "hierarchical": "force_balanced"}


def experts_sweep(base: Shape) -> list[Shape]:
    return [replace(base, experts=experts) for experts in (16, 32, 64, 128, 256)]


def top_k_sweep(base: Shape) -> list[Shape]:
    return [replace(base, top_k=top_k) for top_k in (2, 4, 8, 16) if top_k <= base.experts]


def tokens_sweep(base: Shape) -> list[Shape]:
    return [replace(base, tokens=base.tokens * quarters // 4) for quarters in (1, 2, 4, 8, 16)]


SHAPES: dict[str, Callable[[Shape], list[Shape]]] = {
    "experts": experts_sweep,
    "top_k": top_k_sweep,
    "tokens": tokens_sweep,
}
SWEEPS = (*SHAPES, "ranks")


def main() -> None:
    options = parse_options()
    set_environment(MALLOCS[1])
    report = describe_run(
        "scaling", dtype="float32", malloc=MALLOCS[1], base=asdict(options.shape), rounds=options.rounds, sweeps={}
    )
    print(headline(report))
    for sweep in options.sweep:
        if sweep in SHAPES:
            points = run_ranks(1, measure_shapes, SHAPES[sweep](options.shape), options.rounds)
        else:
            points = [run_ranks(ranks, measure_shapes, [options.shape], options.rounds)[0] for ranks in REAL_RANKS]
        report["sweeps"][sweep] = points
        print(table(sweep, points), flush=True)
        if sweep == "ranks":
            report["sweeps"]["fake ranks"] = run_ranks(1, measure_fake_ranks, options.rounds)
            print(fake_table(report["sweeps"]["fake ranks"]), flush=True)
    write_json(options.json, report)


def parse_options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--sweep", type=choice_of(SWEEPS), default=list(SWEEPS), metavar="NAME,...", help=",".join(SWEEPS)
    )
    parser.add_argument(
        "--shape", type=parse_shape, default=BASE, metavar="T,H,F,E,k", help="what the sweeps start from"
    )
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args()


def measure_shapes(shapes: list[Shape], rounds: int) -> list[dict]:
    """One point of a sweep for each shape; on every rank."""
    ranks, points, steps = dist.get_world_size(), [], {}
    for place, shape in enumerate(shapes):
        points.append({"shape": asdict(shape), "ranks": ranks, "rows": {}, "differing": {}})
        problem = make_problem(shape, dist.get_rank(), ranks)
        limit, expected = Limit(problem), reference(problem)
        for part, ways in (("gemms", limit.gemms()), ("exchange", limit.exchanges(as_routed=False))):
            steps |= {(place, part, way): (nothing, one_after_the_other(*passes)) for way, passes in ways.items()}
        for name in ROWS:
            with contextlib.suppress(ImportError, UnavailableError):
                layer = COMPETITORS[name](problem)
                error = max(relative_errors(layer.results(), expected).values())
                if error <= TOLERANCE:
                    step = one_after_the_other(layer.run_forward, layer.run_backward)
                    steps[place, "layer", name] = (layer.clear, step)
                else:
                    points[place]["differing"][name] = error
    seconds = time_rounds(steps, rounds)
    for place, point in enumerate(points):
        parts = {
            part: {way: row for (at, its, way), row in seconds.items() if (at, its) == (place, part)} for part in PARTS
        }
        point["rows"] = point_rows(**parts, tokens=shapes[place].tokens)
    return points


def one_after_the_other(forward: Callable[[], object], backward: Callable[[], object]) -> Callable[[], None]:
    def step() -> None:
        forward()
        backward()

    return step


def point_rows(gemms: dict, exchange: dict, layer: dict, tokens: int) -> dict[str, dict]:
    """The limit (the faster GEMMs, and the exchange if there is one) and the layers of one point, from their seconds."""
    limit = 1e3 * (min(map(median, gemms.values())) + sum(map(median, exchange.values())))
    rows = {"limit": {"median_ms": limit}} | {name: summary(seconds) for name, seconds in layer.items()}
    for row in rows.values():
        row |= {"us_per_token": 1e3 * row["median_ms"] / tokens, "of_limit": row["median_ms"] / limit}
    return rows


def measure_fake_ranks(rounds: int) -> list[dict]:
    """The host's cost of a rank of large groups. Called outside a group of its own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=max(FAKE_RANKS))
    points, steps = [], {}
    with mirrored_all_to_all():
        for experts, ranks, path in fake_cases():
            start = time.process_time()
            layer = fake_layer(experts, ranks, path)
            build_ms = 1e3 * (time.process_time() - start)
            steps |= {(len(points), name): (nothing, step) for name, step in fake_steps(layer).items()}
            points.append({"experts": experts, "ranks": ranks, "path": path, "build_ms": build_ms})
        for (place, name), found in time_rounds(steps, rounds, time.process_time).items():
            points[place][name] = summary(found)
    return points


def fake_cases() -> list[tuple[int, int, str]]:
    """Experts, ranks and path: all ranks for the first number of experts, the most ranks for the others."""
    first, *others = FAKE_EXPERTS
    groups = [(first, ranks) for ranks in FAKE_RANKS] + [(experts, max(FAKE_RANKS)) for experts in others]
    return [(*group, path) for group in groups for path in FAKE_PATHS if path != "hierarchical" or group[1] > FAKE_NODE]


def fake_layer(experts: int, ranks: int, path: str) -> MoELayer:
    """A layer whose experts are spread over the first ranks of the default group."""
    routing = RoutingConfig.model_validate({"method": FAKE_PATHS[path], "top_k": FAKE_TOP_K})
    moe = MoEConfig(num_experts=experts, ffn_size=FAKE_WIDTH)
    group = dist.new_group(range(ranks)) if ranks > 1 else None
    exchange = None
    if path == "hierarchical":
        inside, between = (dist.new_group(part) for part in (range(FAKE_NODE), range(0, ranks, FAKE_NODE)))
        exchange = HierarchicalExchange(ExpertMap.contiguous(experts, ranks), NodeGroups(FAKE_NODE, 0, inside, between))
    return MoELayer(FAKE_WIDTH, moe, routing, group, exchange=exchange)


def fake_steps(layer: MoELayer) -> dict[str, Callable[[], object]]:
    """With one row for every expert from every rank."""
    hidden_TH = torch.randn(layer.expert_map.num_experts // FAKE_TOP_K, FAKE_WIDTH)
    routing = layer.router(hidden_TH, Tokens())

    def through(hidden_UH: Tensor, routing_U: Routing) -> Tensor:
        rows_RH, _, ticket = layer.dispatcher.dispatch(hidden_UH, routing_U)
        return layer.dispatcher.combine(rows_RH, ticket)

    @torch.no_grad()
    def dispatch() -> None:
        if layer.exchange is None:
            through(hidden_TH, routing)
        else:
            hidden_UH, routing_U, ticket = layer.exchange.send(hidden_TH, routing)
            layer.exchange.bring_back(through(hidden_UH, routing_U), ticket)

    return {"dispatch": dispatch, "layer": lambda: layer(hidden_TH).sum().backward()}


@contextlib.contextmanager
def mirrored_all_to_all() -> Iterator[None]:
    """Inside, an all-to-all of fake ranks brings what it would if all ranks sent what this one sends.

    So counts and rows that arrive are right where all ranks hold the same tokens. Rows that return have the right sizes,
    but are those of this rank's own experts.
    """
    exchange = dist.all_to_all_single

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        work = exchange(output, input, output_split_sizes, input_split_sizes, group, async_op)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = input_split_sizes or [len(input) // ranks] * ranks
        start = sum(sizes[:rank])
        output.view(ranks, -1).copy_(input[start : start + sizes[rank]].reshape(1, -1))
        return work

    with mock.patch.object(dist, "all_to_all_single", all_to_all_single):
        yield


def table(sweep: str, points: list[dict]) -> str:
    """One sweep as text."""
    first = points[0]["rows"]
    lines = [
        "",
        f"{sweep}; otherwise " + "T {tokens}, H {hidden}, F {ffn}, E {experts}, k {top_k}".format(**points[0]["shape"]),
    ]
    lines.append(f"{sweep:>10}  {'':12}{'us/token':>10}{'growth':>8}{'x limit':>9}")
    for point in points:
        value = point["ranks"] if sweep == "ranks" else point["shape"][sweep]
        for name, row in point["rows"].items():
            growth = row["us_per_token"] / first[name]["us_per_token"]
            lines.append(f"{value:10}  {name:12}{row['us_per_token']:10.2f}{growth:8.2f}{row['of_limit']:9.2f}")
        for name, error in point["differing"].items():
            lines.append(f"{value:10}  {name:12} DIFFERS from the plain loop by {error:.1e}, not timed")
    return "\n".join(lines)


def fake_table(points: list[dict]) -> str:
    """The sweep over fake ranks as text."""
    lines = [
        "",
        f"host cost of one rank of a fake group: H and F {FAKE_WIDTH}, k {FAKE_TOP_K}, T E / k; ms of CPU time",
    ]
    lines.append(f"{'experts':>8}{'ranks':>7}  {'path':14}{'build':>9}{'dispatch':>10}{'layer':>9}")
    for point in points:
        dispatch, layer = point["dispatch"]["median_ms"], point["layer"]["median_ms"]
        lines.append(
            f"{point['experts']:8}{point['ranks']:7}  {point['path']:14}{point['build_ms']:9.1f}{dispatch:10.2f}{layer:9.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
