"""moe_dist's own model and its forward pass, for the engines that run it.

Shape letters: B sequences, S sequence length, V vocabulary, T = B S tokens.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from moe_dist.config import Config, Layout
from moe_dist.config.layout import owner_of_expert
from moe_dist.dispatch.exchange import build_exchange
from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.engines.overlap import choose_num_chunks
from moe_dist.layer import MoELayer
from moe_dist.model import Transformer
from moe_dist.placement import ExpertMap
from moe_dist.routing import Tokens


def build_model(
    config: Config,
    layout: Layout,
    vocab_size: int,
    device: torch.device,
    precision: str,
    expert_parallel_group: dist.ProcessGroup | None,
    all_ranks: dist.ProcessGroup | None,
    moe_layer: type[MoELayer] = MoELayer,
) -> Transformer:
    """The model of this rank in float32, or in float64 if that is the precision; collective.

    Args:
        expert_parallel_group: None where one rank holds all experts.
        all_ranks: None if there is one.
        moe_layer: the class of the MoE layers.
    """
    num_chunks = config.parallel.overlap_chunks
    expert_map = ExpertMap.from_owners(owner_of_expert(config))
    model = Transformer(
        config,
        vocab_size,
        expert_parallel_group,
        all_ranks,
        expert_map,
        layout.expert_tensor,
        build_exchange(config, expert_map.sliced(layout.expert_tensor), expert_parallel_group),
        1 if num_chunks == "auto" else num_chunks,
        moe_layer,
    ).to(device, torch.float64 if precision == "float64" else torch.float32)
    if config.model.compile:
        for block in model.blocks():
            for part in (block.attention, block.ffn):
                if part is not None:
                    part.compile()
    if num_chunks == "auto":
        layers, length = list(model.moe_layers.values()), config.training.sequence_length
        chosen = choose_num_chunks(
            layers[0], layout.micro_batch_size, length, vocab_size, autocast=precision == "bfloat16"
        )
        for layer in layers:
            layer.set_num_chunks(chosen)
    return model


def model_loss(model: Callable[..., torch.Tensor], batch: Batch, tokens: Tokens, precision: str) -> torch.Tensor:
    """Cross-entropy summed over the targets of a micro-batch.

    Args:
        model: a Transformer, or what an engine has made of it.
        batch: on the device of the model.
        precision: bfloat16 runs the model under autocast.
    """
    device = batch.input_BS.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        logits_BSV = model(batch.input_BS, tokens, batch.document_BS)
    logits_TV = logits_BSV.flatten(0, 1).to(torch.promote_types(logits_BSV.dtype, torch.float32))
    return functional.cross_entropy(logits_TV, batch.target_BS.flatten(), ignore_index=IGNORED, reduction="sum")


def parts_of(model: Transformer) -> dict[str, nn.Module]:
    """Its parts in the order of the forward pass; the last is the whole model."""
    parts: dict[str, nn.Module] = {"embedding": model.embedding}
    for number, block in enumerate(model.blocks()):
        for name in ("attention", "moe", "ffn"):
            if (part := getattr(block, name)) is not None:
                parts[f"layers.{number}.{name}"] = part
    return parts | {"norm": model.norm, "": model}
