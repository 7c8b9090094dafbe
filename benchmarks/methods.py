"""Trains the quickstart for 200 steps on two expert-parallel ranks with each routing method and balancer, and prints a table.

    python benchmarks/methods.py --output DIR [--only NAME,...]

Runs by the command line, one after the other; one that is finished in DIR is not run again. MaxVio is the mean of the MoE
layers over the last 20 steps, on the loads of all ranks; `largest CV` is over all steps and layers. `gap` is the held-out loss
in nats of token-by-token routing less that of routing as in training, for methods that differ.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

STEPS = 200
COMMON = [
    "--ranks=2",
    "parallel.expert=2",
    f"training.steps={STEPS}",
    f"training.evaluation.interval={STEPS}",
    "training.checkpoint.interval=null",
    "telemetry.interval=1",
]
ALONE = ["routing.bias.rule=none", "routing.losses={}"]


def with_loss(scope: str, *more: str) -> list[str]:
    """A load-balance loss of 1e-2 and nothing else."""
    loss = "routing.losses.load_balance"
    return [*ALONE[:1], "routing.losses.z.coefficient=0", f"{loss}.coefficient=1e-2", f"{loss}.scope={scope}", *more]


VARIANTS: dict[str, list[str]] = {
    "plain": ALONE,
    "sign": ["routing.losses={}"],
    **{
        rule: [f"routing.bias.rule={rule}", "routing.losses={}"]
        for rule in ("proportional", "multiplicative", "momentum", "quantile")
    },
    "multiplicative_1e-2": ["routing.bias.rule=multiplicative", "routing.bias.rate=1e-2", "routing.losses={}"],
    "switch": with_loss("micro_batch"),
    "gshard": with_loss("micro_batch", "routing.losses.load_balance.choices=first"),
    "deepseek": with_loss("sequence"),
    "global_batch": with_loss("global_batch"),
    "noisy": [
        "routing.method=noisy_top_k",
        "routing.bias.rule=none",
        "routing.losses={importance: {coefficient: 0.1}, load: {coefficient: 0.1}}",
    ],
    "gatepro": ["routing.method=gatepro"],
    "base": ["routing.method=base", *ALONE, "routing.top_k=1", "routing.renormalise=false"],
    **{
        method: [f"routing.method={method}", *ALONE]
        for method in ("hash", "sinkhorn", "expert_choice", "expert_threshold", "optimal_transport", "gatepro_ot")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder for the runs")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(VARIANTS), help=",".join(VARIANTS))
    options = parser.parse_args()
    for name in options.only:
        if not is_finished(options.output / name):
            train(VARIANTS[name], options.output / name)
    print(table({name: records(options.output / name) for name in options.only}))


def is_finished(run: Path) -> bool:
    return (run / "metrics.jsonl").exists() and any("val_loss" in record for record in records(run))


def train(overrides: list[str], run: Path) -> None:
    """One run, from its start."""
    command = [sys.executable, "-m", "moe_dist", "train", "configs/quickstart.yaml", *COMMON, *overrides]
    root = Path(__file__).parents[1]
    subprocess.run([*command, "--output", str(run.absolute())], check=True, cwd=root, stdout=subprocess.DEVNULL)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(runs: dict[str, list[dict]]) -> str:
    """A row for each run."""
    lines = ["| | MaxVio | largest CV | held-out bits per byte | gap |", "|---|---|---|---|---|"]
    for name, found in runs.items():
        steps = [record for record in found if "loss" in record]
        evaluation = next(record for record in found if "val_loss" in record)
        last = [record["balance"]["mean"]["max_vio_batch"] for record in steps[-20:]]
        largest = max(layer["cv"] for record in steps for layer in record["balance"]["layers"].values())
        gap = f"{evaluation['train_eval_gap']:+.4f}" if "train_eval_gap" in evaluation else ""
        bits = evaluation["val_bits_per_byte"]
        lines.append(f"| {name} | {sum(last) / len(last):.3f} | {largest:.3f} | {bits:.3f} | {gap} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
