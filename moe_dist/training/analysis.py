"""What the routers of a finished run do on held-out text: which experts go together, for which tokens, and since when.

Shape letters: T tokens, E experts, V vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config import Config, ConfigError, build_config, layout_of
from moe_dist.config.load import read_yaml
from moe_dist.engines.native import NativeEngine
from moe_dist.routing import Routing, Tokens, real_pairs
from moe_dist.routing.metrics import (
    coactivation,
    coactivation_rate,
    expert_specialisation,
    mask_saturation,
    max_vio,
    vocabulary_counts,
)
from moe_dist.training.checkpoint import load_checkpoint
from moe_dist.training.data import TextData
from moe_dist.training.folder import complete_checkpoints


@dataclass(frozen=True)
class Chosen:
    """What the router of one layer chose for the same tokens."""

    id_T: Tensor
    chosen_TE: Tensor
    """bool; padding is left out."""


def config_of_run(run: Path) -> Config:
    """The run's config, changed to one rank that holds all experts. Raises ConfigError if the folder holds no run."""
    if not (run / "config.yaml").exists():
        raise ConfigError(f"DIR: {str(run)!r} holds no config.yaml, so no run")
    tree = read_yaml(run / "config.yaml")
    tree["parallel"] = {}
    tree["training"]["micro_batch_size"] = None
    return build_config(tree, 1)


def analyse(run: Path, config: Config, num_tokens: int, device: torch.device) -> dict[str, Any]:
    """Measures of each MoE layer, by layer number, for the last checkpoint; saturation of the earlier ones against it.

    Args:
        num_tokens: held-out tokens to route.

    Raises:
        ConfigError: if the run has no complete checkpoint, or no held-out text.
    """
    checkpoints = complete_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise ConfigError(f"DIR: {str(run)!r} holds no complete checkpoint")
    layout, data = layout_of(config, 1), TextData(config)
    batches = data.evaluation_batches(0, layout, num_tokens)
    if not batches:
        raise ConfigError(f"--tokens: {num_tokens} are less than a sequence of the held-out text")
    engine = NativeEngine(config, layout, device, config.model.vocab_size or data.vocab_size)
    last, *earlier = reversed(checkpoints)
    step = load_checkpoint(last, engine)
    now = _choices(engine, batches)
    layers = {number: _measures(chosen, engine.config) for number, chosen in now.items()}
    for checkpoint in earlier:
        before_step = load_checkpoint(checkpoint, engine)
        for number, before in _choices(engine, batches).items():
            share_T = mask_saturation(before.chosen_TE, now[number].chosen_TE)
            layers[number]["saturation"][str(before_step)] = share_T.mean().item()
    return {"step": step, "tokens": len(next(iter(now.values())).id_T), "layers": layers}


def write_analysis(run: Path, result: dict[str, Any]) -> Path:
    """Write everything measured to DIR/routing.json."""
    path = run / "routing.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _choices(engine: NativeEngine, batches: list[Any]) -> dict[str, Chosen]:
    """By layer number what evaluation chooses for all tokens of the batches."""
    kept: dict[str, list[Chosen]] = {str(number): [] for number in engine.moe_layers}

    def keep(number: str) -> Any:
        def hook(router: nn.Module, args: tuple[Tensor, Tokens], routing: Routing) -> None:
            tokens = args[1]
            assert tokens.id_T is not None
            routing = real_pairs(routing)
            chosen_TE = torch.zeros(
                len(tokens.id_T), len(routing.load_E), dtype=torch.bool, device=routing.load_E.device
            )
            chosen_TE[routing.token_P, routing.expert_P] = True
            real_T = torch.ones_like(tokens.id_T, dtype=torch.bool) if tokens.padding_T is None else ~tokens.padding_T
            kept[number].append(Chosen(tokens.id_T[real_T].cpu(), chosen_TE[real_T].cpu()))

        return hook

    layers = engine.moe_layers.items()
    handles = [layer.router.register_forward_hook(keep(str(number))) for number, layer in layers]
    engine.evaluate(batches)
    for handle in handles:
        handle.remove()
    return {
        number: Chosen(torch.cat([c.id_T for c in parts]), torch.cat([c.chosen_TE for c in parts]))
        for number, parts in kept.items()
    }


def _measures(chosen: Chosen, config: Config) -> dict[str, Any]:
    token_P, expert_P = chosen.chosen_TE.nonzero(as_tuple=True)
    num_experts = config.moe.num_experts
    vocab_size = int(chosen.id_T.max()) + 1
    rate_EE = coactivation_rate(coactivation(token_P, expert_P, len(chosen.id_T), num_experts))
    counts = vocabulary_counts(chosen.id_T, None, token_P, expert_P, vocab_size, num_experts)
    mean_E, num_ids_E = expert_specialisation(*counts)
    return {
        "max_vio": max_vio(chosen.chosen_TE.sum(0)).item(),
        "coactivation": rate_EE.tolist(),
        "specialisation": mean_E.tolist(),
        "ids": num_ids_E.tolist(),
        "saturation": {},
    }
