"""Names of weights that do not depend on the layout of ranks: what checkpoints and tests know a tensor by.

Dense weights keep the names of the modules. Each routed expert has its own: layers.{i}.experts.{global id}.{w_gate,
w_up, w_down}, whichever rank holds it and however it is packed there.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_dist.model.transformer import Transformer
from moe_dist.placement import WIDTH_DIMENSION


def global_tensors(
    model: Transformer, source: Callable[[nn.Parameter], torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of this rank by its global name, as a view that can be written to.

    Args:
        source: gives what to view for each parameter, as large as its part on this rank: its gradient, a moment of the
            optimiser. Default: the parameter itself.

    Yields:
        Name and tensor. Where the engine slices, shards or replicates, it is a DTensor that knows so; that of one expert has
        the global shape [H, F] or [F, H].
    """
    source = source or local_tensor
    for name, parameter in model.named_parameters():
        if ".moe.experts." not in name:
            yield name, _as_sharded(source(parameter), parameter)
    for number, layer in model.moe_layers.items():
        stack = layer.experts.w_down  # all stacks of a layer are sharded alike
        is_sharded = isinstance(stack, DTensor) and stack.placements[0].is_shard()
        for place, expert in enumerate(layer.own_experts):
            for key, view in layer.experts.weights_of(place, source).items():
                yield f"layers.{number}.experts.{expert}.{key}", _as_expert(view, key, model.same_experts, is_sharded)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor on this rank, without gradient history."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _as_sharded(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(local, mesh, placements, shape=parameter.shape, stride=parameter.stride())


def _as_expert(view: torch.Tensor, key: str, mesh: DeviceMesh | None, is_sharded: bool) -> torch.Tensor:
    """Cut along the FFN width over the first axis of the mesh. The second shards dimension 1 of the stack, 0 of an expert."""
    if mesh is None or mesh.size() == 1:
        return view
    return DTensor.from_local(view, mesh, [Shard(WIDTH_DIMENSION[key]), Shard(0) if is_sharded else Replicate()])
