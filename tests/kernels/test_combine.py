"""The weighted sum over a token's pairs, and its backward.

Shape letters: T tokens, H hidden, P pairs, W slots.
"""

from types import ModuleType

import pytest
import torch

from moe_dist.kernels import reference


@pytest.fixture
def combine(device: torch.device) -> ModuleType:
    from moe_dist.kernels import combine

    return combine


PAIRS = {
    "two each": [2, 2, 2, 2],
    "uneven, none first and last": [0, 3, 0, 1, 5, 0],
    "one each": [1] * 5,
    "no pairs": [0, 0],
    "no tokens": [],
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "empty_slots"), [(torch.float32, 0), (torch.bfloat16, 3), (torch.float16, 0)])
@pytest.mark.parametrize("pairs_T", PAIRS.values(), ids=list(PAIRS))
def test_as_the_reference(
    combine: ModuleType,
    generator: torch.Generator,
    pairs_T: list[int],
    empty_slots: int,
    dtype: torch.dtype,
    weighted: bool,
) -> None:
    device, pairs = generator.device, sum(pairs_T)
    first_T = torch.tensor([sum(pairs_T[:t]) for t in range(len(pairs_T))], device=device, dtype=torch.int64)
    slot_P = torch.randperm(pairs + empty_slots, generator=generator, device=device)[:pairs]
    rows_WH = torch.randn(pairs + empty_slots, 20, generator=generator, device=device).to(dtype)
    d_out_TH = torch.randn(len(pairs_T), 20, generator=generator, device=device).to(dtype)
    weight_P = torch.randn(pairs, generator=generator, device=device) if weighted else None
    pairing = slot_P, first_T, weight_P
    torch.testing.assert_close(combine.combine(rows_WH, *pairing), reference.combine(rows_WH, *pairing))
    found = combine.combine_backward(d_out_TH, rows_WH, *pairing)
    torch.testing.assert_close(found, reference.combine_backward(d_out_TH, rows_WH, *pairing))


def test_pairs_are_added_in_order_in_float32(combine: ModuleType, device: torch.device) -> None:
    # Any other order, or bfloat16, gives another sum: 2^24 + 1 = 2^24 in float32, and 2^24 - 2^24 + 1 = 1.
    rows_WH = torch.tensor([[1.0], [-(2.0**24)], [1.0], [2.0**24]], dtype=torch.bfloat16, device=device)
    first_T = torch.tensor([0, 4], dtype=torch.int32, device=device)
    for slots, total in (([3, 0, 1, 2], 1.0), ([3, 1, 0, 2], 2.0), ([0, 2, 3, 1], 2.0), ([0, 3, 2, 1], 0.0)):
        out_TH = combine.combine(rows_WH, torch.tensor(slots, device=device), first_T)
        assert out_TH.tolist() == [[total], [0.0]]


def test_gradients_of_a_plain_loop(combine: ModuleType, generator: torch.Generator) -> None:
    device, tokens = generator.device, [0, 0, 2, 3, 3, 3]
    rows_WH = torch.randn(8, 6, generator=generator, device=device, requires_grad=True)
    weight_P = torch.randn(6, generator=generator, device=device, requires_grad=True)
    d_out_TH = torch.randn(4, 6, generator=generator, device=device)
    slot_P = torch.tensor([5, 0, 7, 2, 1, 3], device=device)
    out = [
        sum((weight_P[p] * rows_WH[slot_P[p]] for p in range(6) if tokens[p] == t), rows_WH[0] * 0) for t in range(4)
    ]
    expected = torch.autograd.grad(torch.stack(out), (rows_WH, weight_P), d_out_TH)
    first_T = torch.tensor([0, 2, 2, 3], device=device)
    with torch.no_grad():
        found = combine.combine_backward(d_out_TH, rows_WH, slot_P, first_T, weight_P)
        torch.testing.assert_close(combine.combine(rows_WH, slot_P, first_T, weight_P), torch.stack(out))
    torch.testing.assert_close(found, expected)


def test_rows_beyond_32_bits(combine: ModuleType, far: torch.Tensor) -> None:
    rows_WH, d_out_TH = far.as_strided((3, 8), (2**30, 1)), far.as_strided((3, 8), (2**30, 1), 8)
    for tensor in (rows_WH, d_out_TH):
        tensor.copy_(torch.arange(24).view(3, 8) % 5)
    pairing = tuple(torch.tensor(x, dtype=torch.int32, device=far.device) for x in ([2, 0, 1], [0, 2, 2]))
    torch.testing.assert_close(combine.combine(rows_WH, *pairing), reference.combine(rows_WH, *pairing))
    found = combine.combine_backward(d_out_TH, rows_WH, *pairing)
    torch.testing.assert_close(found, reference.combine_backward(d_out_TH, rows_WH, *pairing))


def test_mistakes_are_named(combine: ModuleType, device: torch.device) -> None:
    rows_WH, first_T = torch.zeros(4, 6, device=device), torch.tensor([0, 2], device=device)
    slot_P, weight_P = torch.arange(4, device=device), torch.zeros(4, device=device)
    wrong = [
        ((rows_WH.double(), slot_P, first_T), "rows_WH: torch.float64"),
        ((rows_WH.t(), slot_P, first_T), r"rows_WH: strides \(1, 6\)"),
        ((rows_WH, slot_P.to(torch.int16), first_T), "slot_P: torch.int16; must be one of torch.int32, torch.int64"),
        ((rows_WH, slot_P, first_T[None]), r"first_T: shape \(1, 2\); must be \(any\)"),
        ((rows_WH, slot_P, first_T, weight_P[:3]), r"weight_P: shape \(3,\); must be \(4\)"),
        ((rows_WH, slot_P, first_T, weight_P.half()), "weight_P: torch.float16; must be one of torch.float32"),
        (
            (torch.zeros(1, 2**15 + 1, device=device), slot_P, first_T),
            "columns of rows_WH: 32769; must be at most 32768",
        ),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            combine.combine(*arguments)
    with pytest.raises(ValueError, match=r"d_out_TH: shape \(4, 6\); must be \(2, 6\)"):
        combine.combine_backward(rows_WH, rows_WH, slot_P, first_T)
