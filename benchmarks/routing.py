"""Times what balanced routing costs, relative to the MoE layer that it serves.

    python benchmarks/routing.py [--tokens 8192] [--rounds 10] [--device cpu|cuda] [--ranks 1] [--json FILE]

64 experts, 6 of them for each token; the layer has hidden size 1024 and SwiGLU experts of width 1408, forward and backward in
float32 on a CPU and bfloat16 on a GPU. A decision is timed on scores that are there already, without gradient, as in a
training step. On several ranks (gloo, or NCCL with a GPU each) every rank has tokens / ranks, `global` means all of them, and
the time of a round is that of the slowest rank. Rounds are interleaved; medians are compared. On a GPU, `launches` counts the
kernels of one decision.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

from moe_dist import MoELayer
from moe_dist.config import MoEConfig, RoutingConfig
from moe_dist.parallel.memory import keep_freed_memory
from moe_dist.routing import Tokens, build_router
from moe_dist.routing.assignment import assign
from moe_dist.routing.sinkhorn import sinkhorn_prices

EXPERTS, TOP_K, HIDDEN, WIDTH, SEQUENCE = 64, 6, 1024, 1408, 256
WARM_UP_ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help=f"over all ranks, a multiple of {SEQUENCE} x ranks")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (options, f"{folder}/store"), nprocs=options.ranks)


def worker(rank: int, options: argparse.Namespace, store: str) -> None:
    """One rank; rank 0 prints."""
    keep_freed_memory()  # as in training
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.ranks))
    is_gpu = options.device == "cuda"
    device = torch.device("cuda", rank) if is_gpu else torch.device("cpu")
    backend = "nccl" if is_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    group = dist.group.WORLD if options.ranks > 1 else None
    tokens = options.tokens // options.ranks
    torch.manual_seed(rank)
    steps = {"layer": layer_step(tokens, device, group), **decisions(tokens, device, group)}
    seconds = time_rounds(steps, options.rounds, device)
    launches = {name: count_launches(step) for name, step in steps.items()} if is_gpu else {}
    if rank == 0:
        print(
            f"T={options.tokens} E={EXPERTS} k={TOP_K} on {options.ranks} x {device_name(device)}, torch {torch.__version__}"
        )
        print(table(seconds, launches))
        if options.json:
            options.json.write_text(json.dumps({"seconds": seconds, "launches": launches}, indent=1) + "\n")
    dist.destroy_process_group()


def layer_step(tokens: int, device: torch.device, group: dist.ProcessGroup | None) -> Callable[[], object]:
    """Forward and backward of the MoE layer with plain top-k routing."""
    routing = RoutingConfig(top_k=TOP_K)
    with torch.device(device):
        layer = MoELayer(HIDDEN, MoEConfig(num_experts=EXPERTS, ffn_size=WIDTH), routing, group)
    layer.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    layer.router.tolerates_nonfinite = True
    hidden = torch.randn(tokens, HIDDEN, device=device, dtype=layer.experts.w_down.dtype)
    return lambda: layer(hidden).sum().backward()


def decisions(tokens: int, device: torch.device, group: dist.ProcessGroup | None) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    scores_TE = torch.randn(tokens, EXPERTS, device=device).sigmoid()
    by_sequence_GNE = scores_TE.view(-1, SEQUENCE, EXPERTS)
    hidden_TH = torch.randn(tokens, HIDDEN, device=device)
    found: dict[str, Callable[[], object]] = {
        "top-k of the scores": lambda: scores_TE.topk(TOP_K, dim=1),
        "sinkhorn, global, 10 iterations": lambda: sinkhorn_prices(scores_TE[None], TOP_K, 0.5, 10, None, group),
        "exact assignment, groups of 256": lambda: assign(by_sequence_GNE, TOP_K, SEQUENCE * TOP_K // EXPERTS),
        "exact assignment, one group": lambda: assign(scores_TE[None], TOP_K, tokens * TOP_K // EXPERTS),
    }
    for method in ("top_k", "sinkhorn", "optimal_transport", "expert_choice", "expert_threshold"):
        group_key = "global" if method == "sinkhorn" else {"sequences": 1}
        config = RoutingConfig.model_validate(
            {"method": method, "top_k": TOP_K, "group": group_key, "score": "sigmoid"}
        )
        found[f"whole router: {method}"] = whole_router(config, hidden_TH, group)
    return found


def whole_router(
    config: RoutingConfig, hidden_TH: torch.Tensor, group: dist.ProcessGroup | None
) -> Callable[[], object]:
    """The forward of a router, with its logits and all it counts."""
    router = build_router(HIDDEN, EXPERTS, config, group).to(hidden_TH.device)
    router.tolerates_nonfinite = True
    tokens = Tokens(num_sequences=len(hidden_TH) // SEQUENCE)
    return lambda: router(hidden_TH, tokens)


def time_rounds(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round, each the slowest rank's."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP_ROUNDS + rounds):
        for name, step in steps.items():
            dist.barrier()
            synchronise(device)
            began = time.perf_counter()
            step()
            synchronise(device)
            took = torch.tensor(time.perf_counter() - began, device=device)
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if number >= WARM_UP_ROUNDS:
                seconds[name].append(took.item())
    return seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_launches(step: Callable[[], object]) -> int:
    """Kernels that a step starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def table(seconds: dict[str, list[float]], launches: dict[str, int]) -> str:
    """Medians, relative to the layer."""
    median = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
    lines = ["| | median ms | of the layer | launches |", "|---|---|---|---|"]
    for name, value in median.items():
        share = f"{value / median['layer']:.2%}"
        lines.append(f"| {name} | {value * 1e3:.2f} | {share} | {launches.get(name, '')} |")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
