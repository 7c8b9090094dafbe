"""Sinkhorn and dual iterations in one launch.

Shape letters: G groups, R rows, C columns.
"""

from types import ModuleType

import pytest
import torch

from moe_dist.kernels import reference


@pytest.fixture
def solvers(device: torch.device) -> ModuleType:
    from moe_dist.kernels import solvers

    return solvers


@pytest.fixture
def small_tiles(solvers: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of a few rows takes several tiles."""
    monkeypatch.setattr(solvers, "TILE", 64)


SHAPES = [(2, 40, 6), (1, 17, 32), (1, 1, 3)]


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sinkhorn_as_the_reference(
    solvers: ModuleType, generator: torch.Generator, shape: tuple[int, int, int], padded: bool
) -> None:
    logits_GRC, real_GR = 5 + 2 * draw(generator, *shape), None
    if padded:
        real_GR = torch.rand(shape[:2], generator=generator, device=generator.device) < 0.7
        logits_GRC[~real_GR] = torch.nan
    for iterations in (0, 1, 4):
        arguments = logits_GRC, 2, 0.1, iterations, real_GR
        torch.testing.assert_close(
            solvers.sinkhorn_prices(*arguments), reference.sinkhorn_prices(*arguments), rtol=1e-4, atol=1e-5
        )


def test_sinkhorn_balances_the_columns(solvers: ModuleType, generator: torch.Generator) -> None:
    logits_RC = draw(generator, 24, 4) + torch.tensor([3.0, 0, 0, -3], device=generator.device)
    price_C = solvers.sinkhorn_prices(logits_RC[None], 2, 0.5, 40)[0]
    plan_RC = 2 * ((logits_RC - price_C) / (0.5 * logits_RC.std(correction=0))).softmax(1)
    torch.testing.assert_close(plan_RC.sum(0), torch.full_like(price_C, 12), rtol=1e-3, atol=0)


def test_groups_without_rows(solvers: ModuleType, device: torch.device) -> None:
    padding_GR = torch.zeros(1, 4, dtype=torch.bool, device=device)
    for logits_GRC, real_GR in ((torch.zeros(1, 0, 5), None), (torch.full((1, 4, 5), torch.inf), padding_GR)):
        arguments = logits_GRC.to(device), 2, 0.1, 3, real_GR
        torch.testing.assert_close(solvers.sinkhorn_prices(*arguments), reference.sinkhorn_prices(*arguments))
    assert solvers.sinkhorn_prices(torch.zeros(0, 4, 5, device=device), 2, 0.1, 3).shape == (0, 5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("padded", "least"), [(False, 0.0), (True, -torch.inf)])
@pytest.mark.parametrize(("shape", "per_row", "capacity"), [((1, 12, 6), 2, 5), ((2, 2, 32), 1, 1), ((1, 5, 4), 3, 4)])
def test_dual_bit_for_bit(
    solvers: ModuleType,
    generator: torch.Generator,
    shape: tuple[int, int, int],
    per_row: int,
    capacity: int,
    padded: bool,
    least: float,
) -> None:
    score_GRC, price_GC = draw(generator, *shape), draw(generator, shape[0], shape[2])
    score_GRC[:, 1::3] = score_GRC[:, ::3][:, : score_GRC[:, 1::3].shape[1]].sign()  # ties, 0 and -0
    real_GR = None
    if padded:
        real_GR = torch.rand(shape[:2], generator=generator, device=generator.device) < 0.7
    least_G = torch.full((shape[0],), least, device=generator.device)
    arguments = score_GRC, price_GC, least_G, per_row, capacity, 2, real_GR
    torch.testing.assert_close(
        solvers.dual_iterations(*arguments), reference.dual_iterations(*arguments), rtol=0, atol=0
    )
    assert torch.equal(solvers.dual_iterations(score_GRC, price_GC, least_G, per_row, capacity, 0), price_GC)


def test_mistakes_are_named(solvers: ModuleType, device: torch.device) -> None:
    score_GRC = torch.zeros(2, 8, 5, device=device)
    price_GC, least_G = torch.zeros(2, 5, device=device), torch.zeros(2, device=device)
    wrong = [
        ((score_GRC.double(), 2, 0.1, 3), "logits_GRC: torch.float64; must be one of torch.float32"),
        ((score_GRC[0], 2, 0.1, 3), r"logits_GRC: shape \(8, 5\); must be \(any, any, any\)"),
        ((score_GRC, 6, 0.1, 3), "top_k: 6; must be from 1 to 5"),
        ((score_GRC, 2, 0.1, 3, torch.ones(2, 8, device=device)), "real_GR: torch.float32; must be one of torch.bool"),
        ((score_GRC[:, :1].expand(2, 2**15 + 1, 5), 2, 0.1, 3), "rows x columns .*: 262152; must be at most 262144"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            solvers.sinkhorn_prices(*arguments)
    for per_row, capacity, message in (
        (5, 3, "per_row: 5; must be from 1 to 4"),
        (2, 8, "capacity: 8; must be from 1 to 7"),
    ):
        with pytest.raises(ValueError, match=message):
            solvers.dual_iterations(score_GRC, price_GC, least_G, per_row, capacity, 2)
    with pytest.raises(ValueError, match=r"price_GC: shape \(2, 4\); must be \(2, 5\)"):
        solvers.dual_iterations(score_GRC, price_GC[:, :4], least_G, 2, 3, 2)
