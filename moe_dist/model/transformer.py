"""The language model.

Shape letters: B sequences, S tokens of a sequence, H hidden, V vocabulary.
"""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from moe_dist.config.layout import moe_layers
from moe_dist.config.schema import Config
from moe_dist.dispatch.exchange import Exchange
from moe_dist.experts import FeedForward
from moe_dist.initial import draw_normal
from moe_dist.layer import MoELayer
from moe_dist.model.attention import Attention
from moe_dist.placement import ExpertMap
from moe_dist.routing import Tokens


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)), where ffn is an MoELayer (`moe`) or dense (`ffn`)."""

    def __init__(self, config: Config, moe: MoELayer | None) -> None:
        super().__init__()
        model = config.model
        self.attention_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.attention = Attention(model)
        self.ffn_norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.moe = moe
        self.ffn = FeedForward(model.hidden_size, model.ffn_size) if moe is None else None

    def forward(self, hidden_BSH: torch.Tensor, tokens: Tokens, mask_B1SS: torch.Tensor | None) -> torch.Tensor:
        hidden_BSH = hidden_BSH + self.attention(self.attention_norm(hidden_BSH), mask_B1SS)
        normed_BSH = self.ffn_norm(hidden_BSH)
        if self.moe is not None:
            return hidden_BSH + self.moe(normed_BSH, tokens)
        assert self.ffn is not None
        return hidden_BSH + self.ffn(normed_BSH)


class Transformer(nn.Module):
    """Tokens -> logits. Initial weights depend on the config and `training.seed` only, never on the layout."""

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        expert_parallel_group: dist.ProcessGroup | None = None,
        data_parallel_group: dist.ProcessGroup | None = None,
        expert_map: ExpertMap | None = None,
        expert_tensor: int = 1,
        exchange: Exchange | None = None,
        num_chunks: int = 1,
        moe_layer: type[MoELayer] = MoELayer,
    ) -> None:
        """See MoELayer for the groups, the map, expert_tensor, the exchange and num_chunks, which all layers share.

        Args:
            moe_layer: the class of the MoE layers.
        """
        super().__init__()
        model = config.model
        self.config = config
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        with_experts = set(moe_layers(config))
        self.layers = nn.ModuleList(
            Block(
                config,
                moe_layer(
                    model.hidden_size,
                    config.moe,
                    config.routing,
                    expert_parallel_group,
                    data_parallel_group,
                    expert_map,
                    vocab_size,
                    expert_tensor,
                    exchange,
                    num_chunks,
                )
                if number in with_experts
                else None,
            )
            for number in range(model.num_layers)
        )
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.output = None if model.tie_embeddings else nn.Linear(model.hidden_size, vocab_size, bias=False)
        self.same_experts: DeviceMesh | None = None
        """[expert_tensor, expert_data]: the ranks that hold any part of the same experts; set by an engine that distributes."""
        self._initialise()

    @property
    def moe_layers(self) -> dict[int, MoELayer]:
        """The MoE layers by layer number."""
        return {number: block.moe for number, block in enumerate(self.blocks()) if block.moe is not None}

    def blocks(self) -> list[Block]:
        """The layers."""
        return [block for block in self.layers if isinstance(block, Block)]

    def forward(self, input_BS: torch.Tensor, tokens: Tokens, document_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, S, V].

        Args:
            input_BS: int64 tokens.
            tokens: what the routers may know of them.
            document_BS: int64; attention stays inside equal numbers. None: it crosses documents.
        """
        mask_B1SS = None if document_BS is None else _document_mask(document_BS)
        hidden_BSH = self.embedding(input_BS)
        for number, block in enumerate(self.blocks()):
            if self.training and self._is_checkpointed(number):
                hidden_BSH = checkpoint(
                    block, hidden_BSH, tokens, mask_B1SS, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden_BSH = block(hidden_BSH, tokens, mask_B1SS)
        output_VH = self.embedding.weight if self.output is None else self.output.weight
        return nn.functional.linear(self.norm(hidden_BSH), output_VH)

    def _is_checkpointed(self, number: int) -> bool:
        layers = self.config.model.activation_checkpointing
        return layers == "all" or (layers != "none" and number in layers)

    def _initialise(self) -> None:
        seed, std = self.config.training.seed, self.config.model.init_std
        output_std = std / math.sqrt(2 * self.config.model.num_layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and ".moe." not in name:  # norms stay at 1
                draw_normal(weight, name, seed, output_std if name.endswith(("w_out.weight", "w_down.weight")) else std)
        for number, layer in self.moe_layers.items():
            layer.initialise(seed, f"layers.{number}", std, output_std)


def _document_mask(document_BS: torch.Tensor) -> torch.Tensor:
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]
