"""How many chunks a dispatch is divided into, where `parallel.overlap_chunks` is auto: by measuring.

Results do not depend on the number, so that a run may come to another one after a restart.
"""

import time

import torch
import torch.distributed as dist

from moe_dist.layer import MoELayer
from moe_dist.routing import Tokens

CANDIDATES = (1, 2, 4)
ROUNDS = 3
GAIN = 0.97
"""More chunks must take at most this part of the time of fewer."""


def choose_num_chunks(
    layer: MoELayer, num_sequences: int, sequence_length: int, vocab_size: int, autocast: bool
) -> int:
    """Time forward and backward of a layer with random tokens of a micro-batch; collective over all ranks.

    Returns the same number on every rank: the fastest by the slowest rank's best time. The layer is as it was, but for its
    number of chunks.
    """
    weight = next(layer.experts.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)  # the run's own random numbers stay where they are
    shape = num_sequences, sequence_length, weight.shape[1]
    hidden = torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)
    token_T = torch.arange(num_sequences * sequence_length, device=weight.device)
    tokens = Tokens(id_T=token_T % vocab_size, global_index_T=token_T, num_sequences=num_sequences)
    was_training = layer.training
    layer.eval()  # so that nothing is counted
    seconds = torch.full((ROUNDS + 1, len(CANDIDATES)), torch.inf, dtype=torch.float64)
    for times in seconds:
        for candidate, num_chunks in enumerate(CANDIDATES):
            layer.set_num_chunks(num_chunks)
            dist.barrier()
            times[candidate] = _time(layer, hidden, tokens, autocast)
    layer.train(was_training)
    best = seconds[1:].amin(0)  # the first round warms up
    dist.all_reduce(best, dist.ReduceOp.MAX)
    chosen = 0
    for candidate in range(1, len(CANDIDATES)):
        if best[candidate] < GAIN * best[chosen]:
            chosen = candidate
    return CANDIDATES[chosen]


def _time(layer: MoELayer, hidden: torch.Tensor, tokens: Tokens, autocast: bool) -> float:
    device = hidden.device
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        out = layer(hidden.requires_grad_(), tokens)
    torch.autograd.grad(out.sum(), [hidden, *layer.parameters()], allow_unused=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
