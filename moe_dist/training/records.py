"""The lines of metrics.jsonl and load/rank_*.jsonl, made from a step's result and the layers' recorders.

Shape letters: N MoE layers, E experts.
"""

import math
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.engines.engine import Engine, StepResult
from moe_dist.routing import observation
from moe_dist.routing.metrics import (
    avg_vio,
    coefficient_of_variation,
    dead_experts,
    drop_rate,
    effective_experts,
    gini,
    max_vio,
    min_vio,
    relative_max_vio,
)


def metrics_record(
    result: StepResult,
    losses: dict[str, float],
    biases: dict[int, torch.Tensor],
    step: int,
    tokens: int,
    tokens_per_second: float,
    learning_rate: float,
) -> dict[str, Any]:
    """The line of one step. `biases` are those of `all_biases`; `tokens`: trained so far."""
    return {
        "step": step,
        "loss": result.loss,
        "tokens": tokens,
        "tokens_per_second": round(tokens_per_second, 1),
        "grad_norm": result.grad_norm,
        "learning_rate": learning_rate,
        "skipped": result.skipped,
        "losses": losses,
        "balance": balance_record(result, biases),
    }


def balance_record(result: StepResult, biases: dict[int, torch.Tensor]) -> dict[str, Any]:
    """Balance of the step over all ranks: of each MoE layer, and the mean of the layers."""
    load_NE, dropped_NE = result.load_NE.cpu(), result.dropped_NE.cpu()
    bias_NE = torch.stack(list(biases.values()))
    columns = {
        "max_vio_batch": max_vio(load_NE),
        "max_vio_over_noise": relative_max_vio(load_NE),
        "min_vio": min_vio(load_NE),
        "avg_vio": avg_vio(load_NE),
        "cv": coefficient_of_variation(load_NE),
        "gini": gini(load_NE),
        "effective_experts": effective_experts(load_NE),
        "drop_rate": drop_rate(load_NE, dropped_NE),
        "pad_rate": _pad_rate(load_NE - dropped_NE, torch.stack([totals["slots"] for totals in result.totals]).cpu()),
        "dead_experts": dead_experts(load_NE),
        "bias_range": bias_NE.amax(1) - bias_NE.amin(1),
    }
    observed = [observation.means(totals) for totals in result.totals]
    for name in observed[0]:
        columns[name] = torch.tensor([means[name] for means in observed])
    layers = {
        str(layer): {name: column[n].item() for name, column in columns.items()} for n, layer in enumerate(biases)
    }
    return {"mean": {name: column.double().mean().item() for name, column in columns.items()}, "layers": layers}


def _pad_rate(kept_NE: torch.Tensor, slots_N: torch.Tensor) -> torch.Tensor:
    """Share of the slots that hold no pair; 0 where pairs travel without padding."""
    return torch.where(slots_N > 0, 1 - kept_NE.sum(1) / slots_N.clamp(min=1), 0.0)


def all_biases(engine: Engine) -> dict[int, torch.Tensor]:
    """The loss-free bias of every MoE layer, on the CPU. Collective."""
    return engine.of_all_layers({n: layer.router.balance.bias_E.cpu() for n, layer in engine.moe_layers.items()})


def summed_losses(engine: Engine) -> dict[str, float]:
    """Auxiliary losses of the step as they join the main loss: over all layers and ranks. Collective."""
    config = engine.config.routing.losses
    names = [name for name in type(config).model_fields if name != "scaling" and getattr(config, name).coefficient]
    if not names:
        return {}
    zero = torch.zeros((), dtype=torch.float64, device=engine.device)
    totals = torch.stack(
        [sum((r.losses.get(name, zero).double() for r in engine.recorders.values()), zero) for name in names]
    )
    dist.all_reduce(totals)
    return dict(
        zip(names, (totals / (engine.layout.copies // engine.layout.pipeline)).tolist(), strict=True)
    )  # others compute them alike


def load_record(engine: Engine, step: int, num_steps: int) -> dict[str, Any]:
    """What this rank did in the forward passes of the last `num_steps` steps, by MoE layer."""
    layers = {}
    for number, layer in engine.moe_layers.items():
        recorder = engine.recorders[number]
        layers[str(number)] = {
            "experts": list(layer.own_experts),
            "tokens": [recorder.rows_of_expert[place] for place in range(len(layer.own_experts))],
            "rows_sent": recorder.rows_sent,
            "rows_received": recorder.rows_received,
            "bytes_sent": recorder.bytes_sent,
            "bytes_between_nodes": recorder.bytes_between_nodes,
            "seconds": {stage: round(seconds, 6) for stage, seconds in recorder.seconds().items()},
        }
    return {"step": step, "rank": dist.get_rank(), "steps": num_steps, "layers": layers}


def evaluation_record(
    step: int, loss_sum: float, num_targets: int, num_bytes: int, load_NE: torch.Tensor
) -> dict[str, Any]:
    """The line of an evaluation; MaxVio of the whole held-out set, mean of the layers."""
    return {
        "step": step,
        "val_loss": loss_sum / max(1, num_targets),
        "val_bits_per_byte": loss_sum / math.log(2) / max(1, num_bytes),
        "max_vio_global": max_vio(load_NE.cpu()).mean().item(),
    }
