"""The forward pass of moe_dist's own model, for the engines that run it.

Shape letters: B sequences, S sequence length, V vocabulary, T = B S tokens.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from moe_dist.engines.batch import IGNORED, Batch
from moe_dist.model import Transformer
from moe_dist.routing import Tokens


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
