"""GatePro's competition of most similar experts: against numpy, the hard variant, switching, edge cases.

Shape letters: T tokens, H hidden, E experts, K experts per token.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.func import functional_call

from moe_dist.config.routing import RoutingConfig
from moe_dist.routing import Tokens, build_router

T, H, E, K = 200, 6, 12, 3


def make_router(penalty: float | str = 1.0, num_experts: int = E, top_k: int = K, **routing: Any) -> nn.Module:
    """Experts in clusters of three similar ones."""
    gatepro = {"penalty": penalty} | routing.pop("gatepro", {})
    settings = {"method": "gatepro", "top_k": top_k, "gatepro": gatepro, **routing}
    router = build_router(H, num_experts, RoutingConfig.model_validate(settings)).double()
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(E // 3, H, dtype=torch.float64, generator=generator).repeat_interleave(3, 0)
    weight = centre + 0.3 * torch.randn(E, H, dtype=torch.float64, generator=generator)
    router.weight.data.copy_(weight[:num_experts])
    return router


def make_hidden(tokens: int = T) -> torch.Tensor:
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losers(logits: npt.NDArray, weight: npt.NDArray) -> npt.NDArray:
    """Bool [T, E]: whose most similar other expert has a higher logit."""
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return logits < logits[:, similarity.argmax(1)]


def pieces(router: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw logits, and who loses."""
    raw = make_hidden() @ router.weight.detach().T
    return raw, torch.from_numpy(losers(raw.numpy(), router.weight.detach().numpy()))


@pytest.mark.parametrize("penalty", [0.0, 1e-4, 0.7, 1e4])
def test_losers_pay_the_penalty(penalty: float) -> None:
    router = make_router(penalty)
    raw, loses = pieces(router)
    assert 0.3 < loses.double().mean() < 0.7
    expected = raw - penalty * loses.double()
    torch.testing.assert_close(router.logits(make_hidden(), Tokens()), expected, rtol=1e-12, atol=1e-12)
    for mode in ("train", "eval"):
        routing = getattr(router, mode)()(make_hidden(), Tokens())
        assert torch.equal(routing.expert_P.view(T, K), expected.topk(K, dim=1).indices)
        torch.testing.assert_close(routing.weight_P.view(T, K), expected.softmax(1).topk(K, dim=1).values)


def test_the_penalty_changes_choices_as_it_grows() -> None:
    choices = [
        make_router(penalty)(make_hidden(), Tokens()).expert_P.view(T, K) for penalty in (0.0, 1e-4, 0.1, "hard")
    ]
    changed = [(choice != choices[0]).any(1).double().mean().item() for choice in choices]
    assert changed[1] < 0.02 < changed[2] < changed[3]
    assert changed[3] > 0.5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("score", ["softmax", "softmax_top_k"])
def test_hard_losers_come_after_all_winners_and_weigh_nothing(score: str, scale: float) -> None:
    many = 6
    router = make_router("hard", top_k=many, score=score)
    raw, loses = pieces(router)
    routing = router(make_hidden() * scale, Tokens())
    chosen, weight = routing.expert_P.view(T, many), routing.weight_P.view(T, many)
    chosen_loses = loses.gather(1, chosen)
    assert not chosen_loses[:, 0].any()  # the best expert of a token never loses
    assert (chosen_loses.int().diff(dim=1) >= 0).all()
    assert (~loses).sum(1).min() < many  # some losers are chosen, for want of winners
    assert torch.equal((~chosen_loses).sum(1), (~loses).sum(1).clamp(max=many))
    assert weight[chosen_loses].max() < 1e-12
    # The order among winners and among losers is that of the logits.
    for row, mine, lost in zip(raw, chosen, loses, strict=True):
        expected = sorted(range(E), key=lambda e, row=row, lost=lost: (bool(lost[e]), -row[e].item()))[:many]
        assert mine.tolist() == expected


@pytest.mark.parametrize("penalty", [0.5, "hard"])
def test_weights_pass_finite_differences(penalty: float | str) -> None:
    """Who loses is no function that has a gradient; nor is how far a hard loser falls."""
    router = make_router(penalty, score="sigmoid" if penalty == "hard" else "softmax")
    inputs = [make_hidden(4), router.weight.detach()]

    def weights(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        routing = functional_call(router, {"weight": weight}, (hidden, Tokens()))
        return routing.weight_P[routing.weight_P > 1e-9]

    assert torch.autograd.gradcheck(weights, [value.clone().requires_grad_() for value in inputs])


def test_start_and_stop() -> None:
    router = make_router("hard", gatepro={"start_step": 3, "stop_step": 5})
    free, on = (make_router(penalty)(make_hidden(), Tokens()).expert_P for penalty in (0.0, "hard"))
    for step, expected in enumerate([free, free, free, on, on, free, free]):
        assert torch.equal(router(make_hidden(), Tokens(step=step)).expert_P, expected)
    forever = make_router("hard", gatepro={"start_step": 3})
    assert torch.equal(forever(make_hidden(), Tokens(step=10**6)).expert_P, on)


def test_similarity_is_that_of_the_present_weights() -> None:
    router = make_router("hard")
    before = router(make_hidden(), Tokens()).expert_P
    with torch.no_grad():
        router.weight.copy_(router.weight.flip(1))
    raw, loses = pieces(router)
    expected = (raw - 1e6 * loses.double()).topk(K, dim=1).indices
    after = router(make_hidden(), Tokens()).expert_P
    assert torch.equal(after.view(T, K), expected)
    assert not torch.equal(after, before)


def test_it_can_take_the_place_of_top_k_at_any_time() -> None:
    """It has no state of its own."""
    plain = build_router(H, E, RoutingConfig(method="top_k", top_k=K)).double()
    make_router().load_state_dict(plain.state_dict())
    assert [name for name, _ in plain.named_buffers()] == [name for name, _ in make_router().named_buffers()]


@pytest.mark.parametrize("penalty", [1.0, "hard"])
def test_edge_cases(penalty: float | str) -> None:
    one = make_router(penalty, num_experts=1, top_k=1)
    assert one(make_hidden(), Tokens()).weight_P.tolist() == [1.0] * T
    twins = make_router(penalty, num_experts=2, top_k=2)
    twins.weight.data[1] = twins.weight.data[0]  # equal logits: neither loses
    assert set(twins(make_hidden(), Tokens()).weight_P.tolist()) == {0.5}
    blank = make_router(penalty)
    blank.weight.data[3] = 0  # similar to nobody
    blank.weight.data[4] = 0
    routing = blank(make_hidden(), Tokens())
    routing.weight_P.sum().backward()
    assert routing.weight_P.isfinite().all()
    assert blank.weight.grad.isfinite().all()
    equal = make_router(penalty)(torch.zeros(3, H, dtype=torch.float64), Tokens())
    assert set(equal.weight_P.tolist()) == {1 / E}
