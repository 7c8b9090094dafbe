"""To compare with code that computes in float32 whatever it is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def float32_means_float64() -> Iterator[None]:
    """What is called float32 while the block runs is float64."""
    with (
        patch.object(torch, "float", torch.float64),
        patch.object(torch, "float32", torch.float64),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
