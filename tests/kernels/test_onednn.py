"""oneDNN's products against float64, and where they are used."""

from typing import Any

import pytest
import torch

from moe_dist.kernels import onednn

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="this torch has no oneDNN")


def factors(layout: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """[48, 40] and [40, 24]; the first as it comes or as the transpose of what is in memory, the second too."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 40, generator=generator), torch.randn(40, 24, generator=generator)
    if "left" in layout:
        x = x.t().contiguous().t()
    if "right" in layout:
        y = y.t().contiguous().t()
    return x.to(dtype), y.to(dtype)


@needs_onednn
@pytest.mark.parametrize("layout", ["plain", "left", "right", "left and right"])
def test_products_are_those_of_float64(layout: str) -> None:
    x, y = factors(layout)
    torch.testing.assert_close(onednn.linear(x, y.t()), (x.double() @ y.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The products given to oneDNN, of a processor on which it is always faster."""
    made: list[Any] = []
    monkeypatch.setattr(onednn, "FASTER", True)
    monkeypatch.setattr(onednn, "FASTER_TRANSPOSED", True)
    monkeypatch.setattr(onednn, "_LARGE_PRODUCT", 48 * 40 * 24)
    monkeypatch.setattr(onednn, "linear", lambda x, w: made.append(x) or x @ w.t())
    return made


@pytest.mark.parametrize("layout", ["plain", "left", "right"])
def test_large_float32_products_go_to_onednn(calls: list[Any], layout: str) -> None:
    x, y = factors(layout)
    torch.testing.assert_close(onednn.matmul(x, y), x @ y)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_others_stay_with_torch(calls: list[Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    x, y = factors("plain", dtype)
    assert torch.equal(onednn.matmul(x, y), x @ y)
    x, y = factors("plain")
    assert torch.equal(onednn.matmul(x[:47], y), x[:47] @ y)  # too small
    monkeypatch.setattr(onednn, "FASTER_TRANSPOSED", False)
    x, y = factors("left")
    assert torch.equal(onednn.matmul(x, y), x @ y)
    assert not calls
