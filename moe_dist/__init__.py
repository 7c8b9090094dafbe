"""moe_dist: an expert-parallel training stack for mixture-of-experts models."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MoELayer"]

if TYPE_CHECKING:
    from moe_dist.layer import MoELayer


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line can report a wrong config without loading torch.
    if name == "MoELayer":
        from moe_dist.layer import MoELayer

        return MoELayer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
