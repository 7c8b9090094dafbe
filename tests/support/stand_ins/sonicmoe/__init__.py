"""Stand-in for sonic-moe 0.1.2.post1, sonicmoe/functional/__init__.py."""

import torch
from sonicmoe.enums import ActivationType
from torch.nn import functional

__version__ = "0.1.2.post1"


def moe_general_routing_inputs(
    x,
    router_scores,
    token_indices,
    expert_indices,
    w1,
    b1,
    w2,
    b2,
    E,
    stream_id,
    activation_type,
    is_inference_mode_enabled=False,
    concat_layout=False,
):
    """(out [T, H], expert_frequency [E] int32).

    Weights: w1 (2I, H, E) and w2 (H, I, E), stride order (2, 0, 1). With concat_layout the rows of w1 are all of gate and
    then all of up; without, they take turns. token_indices ascend, and all three lists are as long.
    """
    assert b1 is None, "not part of the stand-in"
    assert b2 is None, "not part of the stand-in"
    assert activation_type is ActivationType.SWIGLU, "not part of the stand-in"
    assert isinstance(stream_id, int)
    assert len(token_indices) == len(expert_indices) == len(router_scores) > 0
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert bool((token_indices.diff() >= 0).all()), "token_indices have to ascend"
    assert x.is_contiguous()
    for weight in (w1, w2):
        assert weight.shape[2] == E
        assert weight.permute(2, 0, 1).is_contiguous(), "stride order (2, 0, 1)"
    router_scores = router_scores.float()
    expert_frequency = torch.bincount(expert_indices, minlength=E).int()
    out = torch.zeros_like(x)
    for expert in range(E):
        pairs = (expert_indices == expert).nonzero().squeeze(1)
        tokens = token_indices[pairs]
        h = x[tokens] @ w1[:, :, expert].t()
        gate, up = h.chunk(2, dim=1) if concat_layout else (h[:, ::2], h[:, 1::2])
        y = (functional.silu(gate) * up) @ w2[:, :, expert].t()
        out = out.index_add(0, tokens, (y * router_scores[pairs, None]).to(x.dtype))
    return out, expert_frequency
