"""Redoes the comparison of Loss-Free Balancing (arXiv 2408.15664) on a model small enough for one CPU core.

    python benchmarks/loss_free.py [--output runs/loss_free]

Trains configs/experiments/loss_free.yaml by `moe-dist train`, two runs at a time, each on one core: a short look at the
rates of each bias rule with a seed of its own, then every auxiliary loss and every rule with three seeds. A finished run
is not run again, and one that was cut off goes on. Then benchmarks/results/loss_free.json gets every number, docs/images
the two plots (they need matplotlib), and the tables of docs/experiments.md are printed.

Shape letters: B held-out sequences, N MoE layers, E experts, P routed (token, expert) pairs.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_dist.config import layout_of, load_config
from moe_dist.engines.native import NativeEngine
from moe_dist.parallel.environment import read_environment
from moe_dist.parallel.groups import process_group
from moe_dist.routing import Routing
from moe_dist.routing.metrics import max_vio_by_batch_size
from moe_dist.telemetry.records import read_records
from moe_dist.training.checkpoint import load_checkpoint
from moe_dist.training.data import TextData
from moe_dist.training.folder import complete_checkpoints

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/experiments/loss_free.yaml"
RESULTS = ROOT / "benchmarks/results/loss_free.json"
IMAGES = ROOT / "docs/images"

GRID = {
    "alpha": ("1e-2", "1e-3", "1e-4", "0"),
    "sign": ("3e-3", "1e-2"),
    "proportional": ("3e-3", "1e-2"),
    "multiplicative": ("3e-3", "1e-2"),
}
"""Coefficients of the auxiliary loss, and for each bias rule the two rates of lowest MaxVio_global in the look."""
SEEDS = (0, 1, 2)
LOOK = {
    "sign": ("1e-3", "3e-3", "1e-2", "3e-2"),
    "proportional": ("3e-3", "1e-2", "3e-2", "1e-1"),
    "multiplicative": ("1e-3", "3e-3", "1e-2", "3e-2"),
}
"""Rates tried with a seed of its own in a shorter run."""
LOOK_SEED, LOOK_STEPS = 100, 160
METRICS = {"val_loss": "validation loss", "max_vio_global": "MaxVio_global", "max_vio_batch": "MaxVio_batch"}


class Run(NamedTuple):
    """One training run."""

    method: str
    """alpha, or a bias rule."""
    value: str
    """The coefficient, or the rate."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}_{self.value}_seed{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/loss_free"), help="folder of the runs")
    folder = parser.parse_args().output
    look = [Run(method, value, LOOK_SEED) for method, values in LOOK.items() for value in values]
    grid = [Run(method, value, seed) for seed in SEEDS for method, values in GRID.items() for value in values]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: train(run, folder), [*look, *grid]))
    results: dict[str, Any] = {
        "versions": versions(folder / grid[0].name),
        "look": [measure(run, folder) for run in look],
        "runs": [measure(run, folder) for run in grid],
        "computation_batches": computation_batches([run for run in grid if run.method in ("alpha", "sign")], folder),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["look"]), table(results["runs"]), judgement(results["runs"]), sep="\n")
    plot(results)


def overrides(run: Run) -> list[str]:
    """What the run changes in the config."""
    length = [f"training.steps={LOOK_STEPS}"] if run.seed == LOOK_SEED else []
    seed = [f"training.seed={run.seed}", *length]
    if run.method == "alpha":
        return [*seed, f"routing.losses.load_balance.coefficient={run.value}"]
    return [*seed, f"routing.bias.rule={run.method}", f"routing.bias.rate={run.value}"]


def train(run: Run, folder: Path) -> None:
    """One run by the command line, unless it is finished."""
    output = folder / run.name
    summary = output / "summary.json"
    if summary.exists() and json.loads(summary.read_text())["finished"]:
        return
    arguments = [str(CONFIG), *overrides(run), "--ranks", "1", "--output", str(output), "--resume"]
    print("moe-dist train", *arguments, flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moe_dist", "train", *arguments]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


def versions(output: Path) -> dict[str, str]:
    """Of what a run was made with."""
    summary = json.loads((output / "summary.json").read_text())
    return {key: summary[key] for key in ("moe_dist", "torch", "python")}


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """The numbers of a run from its records; MaxVio_batch is the mean over the recorded steps of the last quarter."""
    records = list(read_records(folder / run.name / "metrics.jsonl"))
    evaluation = next(record for record in reversed(records) if "val_loss" in record)
    batches = [
        record["balance"]["mean"]["max_vio_batch"]
        for record in records
        if "balance" in record and record["step"] > 0.75 * evaluation["step"]
    ]
    metrics = {key: evaluation[key] for key in ("val_loss", "max_vio_global")}
    return {**run._asdict(), **metrics, "max_vio_batch": mean(batches)}


def computation_batches(runs: Iterable[Run], folder: Path) -> list[dict[str, Any]]:
    """MaxVio of 1, 2, 4, ... merged held-out sequences, and the noise floor: means over the batches and the layers."""
    curves = []
    data = TextData(load_config(CONFIG, [], 1))  # the same in all runs
    with process_group(read_environment()) as device:
        for run in runs:
            load_BNE = sequence_loads(folder / run.name, data, device)
            sizes = [2**power for power in range(len(load_BNE).bit_length())]
            max_vio_SN, floor_SN = max_vio_by_batch_size(load_BNE, sizes)
            curve = {"sizes": sizes, "max_vio": max_vio_SN.mean(1).tolist(), "floor": floor_SN.mean(1).tolist()}
            curves.append({**run._asdict(), **curve})
    return curves


def sequence_loads(output: Path, data: TextData, device: torch.device) -> Tensor:
    """int64 [B, N, E]: the loads of the held-out sequences, in random order, on the trained model of a run."""
    config = load_config(output / "config.yaml", [], 1)
    layout, training = layout_of(config, 1), config.training
    engine = NativeEngine(config, layout, device, data.vocab_size)
    load_checkpoint(complete_checkpoints(output / "checkpoints")[-1], engine)
    size, num_experts = layout.micro_batch_size, config.moe.num_experts
    loads: list[Tensor] = []  # of each batch and layer, in the order of the forward passes

    def count(router: nn.Module, args: object, routing: Routing) -> None:
        sequence_P = routing.token_P // training.sequence_length
        counts = torch.bincount(sequence_P * num_experts + routing.expert_P, minlength=size * num_experts)
        loads.append(counts.view(size, num_experts))

    for router in engine.routers:
        router.register_forward_hook(count)
    engine.evaluate(data.evaluation_batches(0, layout, training.evaluation.tokens))
    load_BNE = torch.stack(loads).unflatten(0, (-1, len(engine.routers))).transpose(1, 2).flatten(0, 1)
    load_BNE = load_BNE[load_BNE.sum((1, 2)) > 0]  # without padding
    # Neighbours are of one file; training draws its sequences in random order.
    return load_BNE[torch.randperm(len(load_BNE), generator=torch.Generator().manual_seed(0))]


def by_variant(runs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each method and value, in their order."""
    variants: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        label = f"alpha {run['value']}" if run["method"] == "alpha" else f"{run['method']}, u = {run['value']}"
        variants.setdefault(label, []).append(run)
    return variants


def best_alpha(runs: list[dict[str, Any]]) -> str:
    """The auxiliary loss of lowest mean validation loss."""
    variants = by_variant(run for run in runs if run["method"] == "alpha")
    return min(variants, key=lambda label: mean(run["val_loss"] for run in variants[label]))


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: mean (least to greatest) over the seeds."""
    lines = [f"| balancing | {' | '.join(METRICS.values())} |", "|---" * (1 + len(METRICS)) + "|"]
    for label, same in by_variant(runs).items():
        cells = [spread([run[key] for run in same]) for key in METRICS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    around = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{around}"


def judgement(runs: list[dict[str, Any]]) -> str:
    """Markdown: validation loss of every variant less that of the best auxiliary loss with the same seed."""
    variants, best = by_variant(runs), best_alpha(runs)
    seeds = [run["seed"] for run in variants[best]]
    lines = [
        f"| less {best} | mean | {' | '.join(f'seed {seed}' for seed in seeds)} |",
        "|---" * (2 + len(seeds)) + "|",
    ]
    for label, same in variants.items():
        if label != best:
            differences = [run["val_loss"] - base["val_loss"] for run, base in zip(same, variants[best], strict=True)]
            lines.append(f"| {label} | {' | '.join(f'{d:+.3f}' for d in [mean(differences), *differences])} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any]) -> None:
    """The two plots, as small SVG files that do not change if the numbers do not."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    pyplot.rcParams.update({"svg.hashsalt": "loss_free", "svg.fonttype": "none", "font.size": 9})
    IMAGES.mkdir(exist_ok=True)
    for name, draw in {"loss_free_trade_off": draw_trade_off, "loss_free_batches": draw_batches}.items():
        figure, axes = pyplot.subplots(figsize=(7.6, 4.0), layout="constrained")
        draw(axes, results)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


def draw_trade_off(axes: Any, results: dict[str, Any]) -> None:
    for label, same in by_variant(results["runs"]).items():
        marker = "o" if same[0]["method"] == "alpha" else "^"
        max_vio, loss = ([run[key] for run in same] for key in ("max_vio_global", "val_loss"))
        (point,) = axes.plot(mean(max_vio), mean(loss), marker, markersize=9, label=label)
        axes.plot(max_vio, loss, marker, markersize=4, alpha=0.5, color=point.get_color())
    axes.set(xscale="log", xlabel="MaxVio_global", ylabel="validation loss (nats a byte); small: each seed")
    axes.set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10], ticks)
    axes.set_xlim(0.15, 8)


def draw_batches(axes: Any, results: dict[str, Any]) -> None:
    curves = by_variant(results["computation_batches"])
    for label, same in curves.items():
        values = [mean(points) for points in zip(*(curve["max_vio"] for curve in same), strict=True)]
        axes.plot(same[0]["sizes"], values, "o-" if same[0]["method"] == "alpha" else "^-", markersize=4, label=label)
    axes.plot(same[0]["sizes"], same[0]["floor"], "k--", label="noise floor")
    axes.set(xscale="log", yscale="log", xlabel="sequences in a computation batch", ylabel="MaxVio, mean of the seeds")
    axes.set_xticks(same[0]["sizes"][::2], same[0]["sizes"][::2])


if __name__ == "__main__":
    main()
