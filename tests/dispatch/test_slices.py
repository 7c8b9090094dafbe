"""Routing to slices of experts. That slices compute what whole experts do is tested in tests/test_layer.py."""

import dataclasses

import pytest
import torch

from moe_dist.dispatch import to_slices
from moe_dist.routing import Routing

T, E = 5, 3


def make_routing() -> Routing:
    return Routing(
        token_P=torch.tensor([0, 0, 1, 3, 4, 4]),
        expert_P=torch.tensor([2, 0, 1, 1, 0, 2]),
        weight_P=torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        load_E=torch.tensor([2, 3, 2]),
        dropped_E=torch.tensor([0, 1, 0]),
        weight_on="input",
        identity_weight_T=torch.ones(T),
        losses={"z": torch.tensor(0.5)},
        pairs_per_expert=4,
    )


def test_by_hand() -> None:
    routing = make_routing()
    sliced = to_slices(routing, 2)
    assert sliced.token_P.tolist() == [0, 0, 0, 0, 1, 1, 3, 3, 4, 4, 4, 4]
    assert sliced.expert_P.tolist() == [4, 5, 0, 1, 2, 3, 2, 3, 0, 1, 4, 5]
    assert torch.equal(sliced.weight_P, routing.weight_P.repeat_interleave(2))


def test_the_slices_of_a_vacant_pair_are_vacant() -> None:
    vacant = dataclasses.replace(
        make_routing(), token_P=torch.tensor([0, T]), expert_P=torch.tensor([2, E]), weight_P=torch.tensor([0.5, 0.0])
    )
    sliced = to_slices(vacant, 2)
    assert sliced.token_P.tolist() == [0, 0, T, T]
    assert sliced.expert_P.tolist() == [4, 5, 2 * E, 2 * E]
    assert sliced.weight_P.tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_gradients_of_the_slices_add_up(slices: int) -> None:
    """As sum over slices of the gradient that each pair's weight would get by itself."""
    routing = make_routing()
    grad_Pn = torch.rand(6, slices, dtype=torch.float64)
    (to_slices(routing, slices).weight_P * grad_Pn.flatten()).sum().backward()
    torch.testing.assert_close(routing.weight_P.grad, grad_Pn.sum(1), rtol=1e-15, atol=0)


def test_all_else_is_of_experts_as_it_was() -> None:
    routing = make_routing()
    sliced = to_slices(routing, 3)
    for field in dataclasses.fields(Routing):
        if field.name not in ("token_P", "expert_P", "weight_P"):
            assert getattr(sliced, field.name) is getattr(routing, field.name), field.name


def test_no_pairs() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    empty = dataclasses.replace(make_routing(), token_P=none, expert_P=none, weight_P=torch.zeros(0))
    assert to_slices(empty, 2).expert_P.shape == to_slices(empty, 2).weight_P.shape == (0,)
