"""The names by which checkpoints and tests know a tensor."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_dist.config import build_config
from moe_dist.model import Transformer
from moe_dist.model.names import global_tensors, local_tensor
from tests.support.distributed import run_ranks
from tests.support.equality import BASE, VOCABULARY, Tree, build_engine, changed, whole

EXPERTS = {f"layers.{i}.experts.{e}.{w}" for i in (1, 2) for e in range(8) for w in ("w_gate", "w_up", "w_down")}


def make_model(*changes: Tree) -> Transformer:
    return Transformer(build_config(changed(BASE, *changes)), VOCABULARY)


def test_every_expert_has_its_own_names() -> None:
    tensors = dict(global_tensors(make_model()))
    assert {name for name in tensors if "expert" in name} == EXPERTS
    for name in EXPERTS:
        assert tensors[name].shape == ((12, 16) if name.endswith("w_down") else (16, 12)), name


def test_gelu_experts_have_no_gate() -> None:
    names = [name for name, _ in global_tensors(make_model({"moe": {"activation": "gelu"}}))]
    assert {name for name in names if "expert" in name} == {name for name in EXPERTS if "w_gate" not in name}


def test_only_routed_experts_have_expert_in_their_name() -> None:
    """DeepSpeed and Megatron act on such names."""
    model = make_model()
    names = [*dict(model.named_parameters()), *dict(model.named_buffers()), *dict(model.named_modules())]
    assert {name.split(".moe.experts")[0] for name in names if "expert" in name} == {"layers.1", "layers.2"}
    assert not [name for name in names if "expert" in name and ".moe.experts" not in name]


def test_together_they_are_all_the_parameters_and_can_be_written() -> None:
    model = make_model()
    assert sum(tensor.numel() for _, tensor in global_tensors(model)) == sum(p.numel() for p in model.parameters())
    for _, tensor in global_tensors(model):
        tensor.fill_(7)
    assert all((p == 7).all() for p in model.parameters())


def test_another_source_is_seen_under_the_same_names() -> None:
    model = make_model()
    moments = {p: torch.randn_like(p) for p in model.parameters()}
    tensors = dict(global_tensors(model, moments.__getitem__))
    assert tensors.keys() == dict(global_tensors(model)).keys()
    stack = moments[model.layers[2].moe.experts.w_gate_up]
    assert torch.equal(tensors["layers.2.experts.5.w_gate"], stack[5, :, :12])
    assert torch.equal(tensors["layers.2.experts.5.w_up"], stack[5, :, 12:])
    assert torch.equal(tensors["norm.weight"], moments[model.norm.weight])


def distributed_names(tree: Tree) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray], set[str]]:
    """Global shapes, whole tensors after writing a number of its own into each, and what is not a DTensor."""
    engine, _ = build_engine(tree)
    tensors = dict(global_tensors(engine.model))
    plain = {name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    for place, name in enumerate(sorted({*tensors, *EXPERTS})):
        if name in tensors:
            local_tensor(tensors[name]).fill_(place)

    def own(parameter: nn.Parameter) -> torch.Tensor:
        return local_tensor(parameter).clone()

    return {name: tuple(t.shape) for name, t in tensors.items()}, whole(dict(global_tensors(engine.model, own))), plain


@pytest.mark.parametrize("sharding", ["full", "replicate"])
@pytest.mark.parametrize(("num_ranks", "expert", "slices"), [(2, 1, 1), (2, 2, 1), (4, 2, 1), (2, 1, 2), (4, 1, 2)])
def test_names_and_shapes_do_not_depend_on_the_layout(num_ranks: int, expert: int, slices: int, sharding: str) -> None:
    alone = {name: tuple(tensor.shape) for name, tensor in global_tensors(make_model())}
    changes: dict[str, Any] = {
        "parallel": {"expert": expert, "expert_tensor": slices},
        "engine": {"sharding": sharding},
    }
    names: set[str] = set()
    for shapes, tensors, plain in run_ranks(num_ranks, distributed_names, changed(BASE, changes)):
        assert shapes == {name: alone[name] for name in shapes}
        assert not plain if expert < num_ranks else plain == shapes.keys() & EXPERTS
        for name, tensor in tensors.items():
            assert tensor.shape == alone[name]
            assert (tensor == sorted(alone).index(name)).all(), name
        names |= shapes.keys()
    assert names == alone.keys()
