"""The weights of a GPTModel by moe_dist's global names (moe_dist.model.names), which do not depend on the layout.

Megatron packs queries, keys and values of each group of heads, and gate and up of SwiGLU, into one matrix each, and cuts
matrices over the tensor-parallel ranks. A Piece is the part of such a matrix that has a name of its own.

Shape letters: V vocabulary, H hidden, G groups of heads on this rank, D head size, F FFN width on this rank.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_dist.config import Config
from moe_dist.engines.megatron_layer import MegatronMoELayer
from moe_dist.initial import draw_normal
from moe_dist.placement import WIDTH_DIMENSION

View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """A named weight, or this rank's part of it."""

    name: str
    of: View
    """Its view of a tensor that is shaped as the parameter, maybe with other dimensions than the weight."""
    shape: tuple[int, ...]
    """Of the whole weight."""
    dimension: int | None = None
    """Along which it is cut; None: it is whole here."""
    mesh: DeviceMesh | None = None
    """Of the ranks over which it is cut."""

    def local_shape(self) -> list[int]:
        """Of the part on this rank: torch.chunk's, so the last parts may be smaller."""
        shape = list(self.shape)
        if self.mesh is not None and self.dimension is not None:
            whole, ranks = shape[self.dimension], self.mesh.size()
            size = math.ceil(whole / ranks)
            shape[self.dimension] = max(0, min(size, whole - size * self.mesh.get_local_rank()))
        return shape

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of a tensor shaped as the parameter; a DTensor if it is cut. Often a copy."""
        local = self.of(tensor.detach()).reshape(self.local_shape())
        if self.mesh is None:
            return local
        assert self.dimension is not None
        stride = torch.empty(self.shape, device="meta").stride()
        placements = [Shard(self.dimension)]
        return DTensor.from_local(local, self.mesh, placements, shape=torch.Size(self.shape), stride=stride)

    def write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Set the piece of a tensor to this rank's part `value`."""
        view = self.of(tensor.detach())
        local = value.to_local() if isinstance(value, DTensor) else value
        if local.data_ptr() != view.data_ptr():  # else it is what `read` gave as a view
            view.copy_(local.reshape(view.shape))

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole weight."""
        if self.mesh is None or self.dimension is None:
            return whole
        size = math.ceil(whole.shape[self.dimension] / self.mesh.size())
        first = min(size * self.mesh.get_local_rank(), whole.shape[self.dimension])
        return whole.narrow(self.dimension, first, self.local_shape()[self.dimension])


Pieces = dict[nn.Parameter, list[Piece]]


def pieces_of(
    model: Any, config: Config, vocab_size: int, tensor: DeviceMesh | None, slices: DeviceMesh | None
) -> Pieces:
    """The named pieces of every parameter of a pipeline stage (a GPTModel).

    Args:
        vocab_size: V, without what Megatron needs as padding.
        tensor: the tensor-parallel ranks; None for one.
        slices: the ranks that hold slices of the same experts; None for one.
    """
    hidden = config.model.hidden_size
    found: Pieces = {}

    def add(
        parameter: nn.Parameter, name: str, shape: tuple[int, ...], cut: int | None = None, of: View = _whole
    ) -> None:
        mesh = tensor if cut is not None else None
        found.setdefault(parameter, []).append(Piece(name, of, shape, cut if mesh else None, mesh))

    def add_rows(parameter: nn.Parameter, name: str) -> None:
        rows = Piece(name, _whole, (vocab_size, hidden), 0 if tensor else None, tensor).local_shape()[0]
        add(parameter, name, (vocab_size, hidden), 0, lambda t: t[:rows])  # the rest is padding

    if model.pre_process:
        add_rows(model.embedding.word_embeddings.weight, "embedding.weight")
    for layer in model.decoder.layers:
        number = layer.layer_number - 1
        prefix = f"layers.{number}"
        add(layer.input_layernorm.weight, f"{prefix}.attention_norm.weight", (hidden,))
        _attention(layer.self_attention, f"{prefix}.attention", config, add)
        add(layer.pre_mlp_layernorm.weight, f"{prefix}.ffn_norm.weight", (hidden,))
        if isinstance(layer.mlp, MegatronMoELayer):
            found |= _moe(layer.mlp, prefix, config, slices)
        else:
            width = config.model.ffn_size
            fc1, fc2 = layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight
            add(fc1, f"{prefix}.ffn.w_gate.weight", (width, hidden), 0, lambda t: t.chunk(2)[0])
            add(fc1, f"{prefix}.ffn.w_up.weight", (width, hidden), 0, lambda t: t.chunk(2)[1])
            add(fc2, f"{prefix}.ffn.w_down.weight", (hidden, width), 1)
    if model.post_process:
        add(model.decoder.final_layernorm.weight, "norm.weight", (hidden,))
        if model.output_layer.weight is not None:  # a stage of its own has a copy of the tied embedding
            tied = config.model.tie_embeddings
            add_rows(model.output_layer.weight, "embedding.weight" if tied else "output.weight")
    assert len(found) == len(list(model.parameters())), "a parameter has no name"
    return found


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _attention(attention: Any, name: str, config: Config, add: Callable[..., None]) -> None:
    model = config.model
    hidden, heads, groups = model.hidden_size, model.num_heads, model.num_kv_heads or model.num_heads
    size = model.head_size or hidden // heads
    queries = heads // groups * size  # rows of one group

    def part(first: int, rows: int) -> View:
        return lambda t: t.unflatten(0, (-1, queries + 2 * size))[:, first : first + rows]  # [G, rows, H]

    packed = attention.linear_qkv.weight
    add(packed, f"{name}.w_query.weight", (heads * size, hidden), 0, part(0, queries))
    add(packed, f"{name}.w_key.weight", (groups * size, hidden), 0, part(queries, size))
    add(packed, f"{name}.w_value.weight", (groups * size, hidden), 0, part(queries + size, size))
    add(attention.linear_proj.weight, f"{name}.w_out.weight", (hidden, heads * size), 1)
    if model.qk_norm == "head":
        add(attention.q_layernorm.weight, f"{name}.query_norm.weight", (size,))
        add(attention.k_layernorm.weight, f"{name}.key_norm.weight", (size,))


def _moe(layer: MegatronMoELayer, prefix: str, config: Config, slices: DeviceMesh | None) -> Pieces:
    moe = layer.moe
    found: Pieces = {
        parameter: [Piece(f"{prefix}.moe.{name}", _whole, tuple(parameter.shape))]
        for name, parameter in moe.named_parameters()
        if not name.startswith("experts.")
    }
    hidden, width = config.model.hidden_size, config.moe.ffn_size
    for place, expert in enumerate(moe.own_experts):
        for parameter in moe.experts.parameters():
            for key, of in _expert_views(moe.experts, parameter, place).items():
                shape = (width, hidden) if key == "w_down" else (hidden, width)
                cut = WIDTH_DIMENSION[key] if slices else None
                piece = Piece(f"{prefix}.experts.{expert}.{key}", of, shape, cut, slices)
                found.setdefault(parameter, []).append(piece)
    return found


def _expert_views(experts: Any, parameter: nn.Parameter, place: int) -> dict[str, View]:
    if parameter is experts.w_down:
        return {"w_down": lambda t: t[place]}
    if experts.moe.activation == "gelu":
        return {"w_up": lambda t: t[place]}
    return {"w_gate": lambda t: t[place].chunk(2, dim=1)[0], "w_up": lambda t: t[place].chunk(2, dim=1)[1]}


def named(pieces: Pieces, source: Callable[[nn.Parameter], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every piece by its name.

    Args:
        source: what to take the pieces of for each parameter, in its shape: itself, its gradient, a moment.
    """
    for parameter, parts in pieces.items():
        tensor = source(parameter)
        for piece in parts:
            yield piece.name, piece.read(tensor)


def initialise(pieces: Pieces, config: Config) -> None:
    """Draw the weights outside of the MoE layers, as moe_dist.model.Transformer does; norms are 1, padding is 0."""
    seed, std = config.training.seed, config.model.init_std
    output_std = std / math.sqrt(2 * config.model.num_layers)
    for parameter, parts in pieces.items():
        if any(".moe." in piece.name or ".experts." in piece.name for piece in parts) or parameter.dim() < 2:
            continue
        parameter.data.zero_()
        for piece in parts:
            whole = torch.empty(piece.shape)
            is_output = piece.name.endswith(("w_out.weight", "w_down.weight"))
            draw_normal(whole, piece.name, seed, output_std if is_output else std)
            piece.write(parameter, piece.part_of(whole))
