"""Floats as whole numbers of the same order, so that comparisons are exact and NaN has a place."""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
"""Below the key of every float."""


@triton.jit
def key_of(value):
    """int32 keys that compare like float32 values: -inf lowest, NaN above inf, 0 equal to -0."""
    value = tl.where(value == 0, 0.0, value)
    bits = tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(key):
    """The float32 value of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
