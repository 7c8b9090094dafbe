"""Records of a run, per rank: their writers, their reader, and what shows them."""

from typing import TYPE_CHECKING, Any

__all__ = ["Run", "read"]

if TYPE_CHECKING:
    from moe_dist.telemetry.reader import Run, read


def __getattr__(name: str) -> Any:
    # Imported on first use: pandas takes half a second, which a command that reads no records need not wait for.
    if name in __all__:
        from moe_dist.telemetry import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
