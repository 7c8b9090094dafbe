"""The fused journey's backward over several ranks.

A message to another rank is rows and, behind them, as many rows as it takes to hold one number for each: on the way out
the gradients of the outputs with their weights, on the way home the gradients of the rows with those of the weights. One
all-to-all each way moves both, and a message's size follows from its number of rows.

Shape letters: T tokens, H hidden, W slots in the send buffer, V slots with headers, R rows received with headers.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from moe_dist.dispatch.rows import gather_rows, weighted_sum
from moe_dist.dispatch.types import Chunk, Journey, Plan
from moe_dist.experts.types import Incoming, Kernels, Result, Rows, WeightGradients, Weights
from moe_dist.parallel.collectives import start_all_to_all
from moe_dist.parallel.memory import workspace


@dataclass(frozen=True)
class OwnExperts:
    """This rank's experts and what their forward left behind, by chunk."""

    weights: Weights
    kernels: Kernels
    arrived: list[torch.Tensor]
    kept: list[list[torch.Tensor]]
    gradients: WeightGradients | None


@dataclass(frozen=True)
class _Message:
    """Where one rank's part of a chunk stands in a buffer."""

    rows: slice
    header: slice

    @property
    def size(self) -> int:
        return self.header.stop - self.rows.start


@dataclass(frozen=True)
class _Part:
    """A chunk in a buffer: one message a rank."""

    messages: list[_Message]

    @property
    def sizes(self) -> list[int]:
        return [message.size for message in self.messages]

    @property
    def rows(self) -> slice:
        return slice(self.messages[0].rows.start, self.messages[-1].header.stop)


def backward_over_ranks(
    grad_TH: torch.Tensor, weight_W: torch.Tensor, journey: Journey, experts: OwnExperts
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of tokens [T, H] and of the slots' weights [W]; those of the experts are written where they belong."""
    plan, group, width = journey.plan, journey.group, grad_TH.shape[1]
    assert group is not None
    sizes = weight_W.dtype.itemsize, width * grad_TH.dtype.itemsize
    leaving, arriving = (
        _parts([c.send for c in journey.chunks], *sizes),
        _parts([c.receive for c in journey.chunks], *sizes),
    )
    moved = _with_headers(plan, leaving)
    # Gradients of rows come back to where the chunk's gradients of outputs left from.
    slots_VH = workspace("slots", len(moved.token_W), width, grad_TH)
    received_RH = workspace("received", arriving[-1].rows.stop, width, grad_TH)
    home_RH = workspace("home", arriving[-1].rows.stop, width, grad_TH)
    gather_rows(grad_TH, moved.token_W, slots_VH)
    messages = [message for part in leaving for message in part.messages]
    counts = [message.rows.stop - message.rows.start for message in messages]
    for message, weight in zip(messages, weight_W.split(counts), strict=True):
        _write_header(slots_VH, message, weight)

    def start(number: int) -> dist.Work:
        leave, arrive = leaving[number], arriving[number]
        return start_all_to_all(
            "rows", slots_VH[leave.rows], leave.sizes, received_RH[arrive.rows], arrive.sizes, group
        )

    returning = []
    coming = start(0)
    for number, (chunk, leave, arrive) in enumerate(zip(journey.chunks, leaving, arriving, strict=True)):
        here, coming = coming, start(number + 1) if number + 1 < len(leaving) else coming
        here.wait()
        local = _parts([chunk.receive], *sizes)[0]
        incoming = _incoming(received_RH[arrive.rows], local, chunk, weight_W.dtype, experts.kept[number])

        def rows_done(result: Result, leave: _Part = leave, arrive: _Part = arrive, local: _Part = local) -> None:
            message = _answer(result, local, home_RH[arrive.rows])
            to = (arrive.sizes, slots_VH[leave.rows], leave.sizes)
            returning.append(start_all_to_all("rows", message, *to, group))

        x = Rows(experts.arrived[number], chunk.segments.starts())
        to = (experts.weights, experts.gradients, "d_rows")
        experts.kernels.backward(x, incoming, chunk.segments, *to, rows_done)
    for work in returning:
        work.wait()
    d_weight_W = torch.cat([_read_header(slots_VH, message, weight_W.dtype) for message in messages])
    return weighted_sum(slots_VH, None, moved), d_weight_W


def _incoming(
    received_RH: torch.Tensor, part: _Part, chunk: Chunk, dtype: torch.dtype, kept: list[torch.Tensor]
) -> Incoming:
    """The gradients and weights of a chunk's segments, which come rank by rank with headers in between."""
    end = max((message.rows.stop for message in part.messages if message.size), default=0)
    weight_R = received_RH.new_zeros(end, dtype=dtype)
    starts: list[int] = []
    segments_of_rank = len(chunk.segments.sizes) // len(part.messages)
    for rank, message in enumerate(part.messages):
        weight_R[message.rows] = _read_header(received_RH, message, dtype)
        start = message.rows.start
        for size in chunk.segments.sizes[rank * segments_of_rank : (rank + 1) * segments_of_rank]:
            starts.append(start)
            start += size
    return Incoming(Rows(received_RH[:end], starts), weight_R, kept)


def _answer(result: Result, part: _Part, out_RH: torch.Tensor) -> torch.Tensor:
    """The gradients of rows and weights, as messages in `out_RH`."""
    assert result.d_weight_Q is not None
    place_R = result.place_R
    if place_R is None:
        place_R = torch.arange(len(result.rows_QH), device=out_RH.device)
    # A header's row is any, until it is written.
    index_R = place_R.new_zeros(len(out_RH)).index_copy_(0, _rows_of([part], out_RH.device), place_R)
    gather_rows(result.rows_QH, index_R, out_RH)
    counts = [message.rows.stop - message.rows.start for message in part.messages]
    for message, d_weight in zip(part.messages, result.in_order(result.d_weight_Q).split(counts), strict=True):
        _write_header(out_RH, message, d_weight)
    return out_RH


def _parts(counts_of_chunk: list[list[int]], number_size: int, row_size: int) -> list[_Part]:
    """Messages one after the other; sizes in bytes of a number and of a row."""
    parts, start = [], 0
    for counts in counts_of_chunk:
        messages = []
        for count in counts:
            end = start + count
            header = slice(end, end + -(-count * number_size // row_size))
            messages.append(_Message(slice(start, end), header))
            start = header.stop
        parts.append(_Part(messages))
    return parts


def _with_headers(plan: Plan, parts: list[_Part]) -> Plan:
    """The plan for a send buffer with headers between the slots; a header's token is any."""
    slot_W = _rows_of(parts, plan.token_W.device)
    token_V = plan.token_W.new_zeros(parts[-1].rows.stop).index_copy_(0, slot_W, plan.token_W)
    return Plan(plan.num_tokens, plan.token_P, slot_W[plan.slot_P], token_V)


def _rows_of(parts: list[_Part], device: torch.device) -> torch.Tensor:
    """int64: the rows of all messages."""
    return _cached_rows(tuple((m.rows.start, m.rows.stop) for part in parts for m in part.messages), device)


# Those of static routings are made once: a CUDA graph cannot hold a copy from the host.
@lru_cache(maxsize=64)
def _cached_rows(runs: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop) for start, stop in runs]).to(device, non_blocking=True)


def _write_header(buffer_H: torch.Tensor, message: _Message, numbers: torch.Tensor) -> None:
    header = buffer_H[message.header].view(torch.uint8).flatten()
    header[: numbers.nbytes].copy_(numbers.contiguous().view(torch.uint8))


def _read_header(buffer_H: torch.Tensor, message: _Message, dtype: torch.dtype) -> torch.Tensor:
    header = buffer_H[message.header].view(torch.uint8).flatten()
    numbers = header[: (message.rows.stop - message.rows.start) * dtype.itemsize]
    return numbers.clone().view(dtype)  # in the buffer they may stand at any byte
