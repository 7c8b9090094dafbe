"""Stand-in for sonic-moe 0.1.2.post1, sonicmoe/enums.py."""

from enum import Enum


class ActivationType(Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"
    REGLU = "reglu"
    RELU_SQ = "relu_sq"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
