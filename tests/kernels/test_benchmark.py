"""benchmarks/kernels_gpu.py: all paths of a case agree, one that does not is not timed, and without a GPU it says so."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # where the scripts find each other

import kernels_gpu
from peers import Shape


def some_times(steps: dict[str, Any]) -> dict[str, list[float]]:
    """No clock: 1, 2, 3 seconds."""
    return {name: [place + 1.0] * 3 for place, name in enumerate(steps)}


def test_all_paths_agree(device: torch.device) -> None:
    from kernel_cases import OURS, cases

    found = [
        kernels_gpu.measure(c, some_times) for c in cases(Shape(16, 16, 8, 4, 2), device, torch.float32, compiled=False)
    ]
    assert len(found) == 12
    for result in found:
        assert not result["differing"], result
        assert list(result["rows"])[-1] == OURS
        assert len(result["rows"]) >= 2


def test_what_differs_is_not_timed(device: torch.device) -> None:
    from kernel_cases import Case

    one, other = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    case = Case("case", {"first": lambda: (one,), "wrong": lambda: (other,), "triton": lambda: (one,)}, flops=6e12)
    result = kernels_gpu.measure(case, some_times)
    assert list(result["rows"]) == ["first", "triton"]
    assert list(result["differing"]) == ["wrong"]
    assert result["rows"]["triton"]["of_torch"] == 2
    assert result["rows"]["triton"]["tflops"] == pytest.approx(3)
    assert "wrong           DIFFERS by inf, not timed" in kernels_gpu.table(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [kernels_gpu.__file__])
    with pytest.raises(SystemExit) as end:
        kernels_gpu.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == "no kernel was timed: torch sees no GPU"
