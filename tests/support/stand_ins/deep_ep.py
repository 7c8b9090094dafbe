"""Stand-in for deep_ep 1.2.1, deep_ep/buffer.py: the high-throughput kernels of DeepEP's tag v1.2.1 (commit 9af0e0d).

Rows travel by gloo. A token goes to each rank that has one of its experts, once; rows arrive by source rank and then by
token; combine adds up in float32 over ranks in order and rounds once.
"""

from typing import Any

import torch
import torch.distributed as dist


class EventOverlap:
    """deep_ep/utils.py; without async_finish there is nothing to wait for."""

    def __init__(self, event: Any = None, extra_tensors: Any = None) -> None:
        self.event, self.extra_tensors = event, extra_tensors


class Config:
    """csrc/deep_ep.cpp; the hints are upper bounds that grow as the real ones do."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        assert num_sms >= 0
        assert 0 < num_max_nvl_chunked_send_tokens < num_max_nvl_chunked_recv_tokens
        assert 0 < num_max_rdma_chunked_send_tokens < num_max_rdma_chunked_recv_tokens
        self.tokens = num_sms // 2 * num_max_nvl_chunked_recv_tokens

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int, /) -> int:
        assert num_ranks < 8 or num_ranks % 8 == 0
        return -(-self.tokens * min(num_ranks, 8) * hidden_bytes // 128) * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int, /) -> int:
        return 0 if num_ranks <= 8 else -(-self.tokens * num_ranks // 8 * hidden_bytes // 128) * 128


class Buffer:
    num_sms: int = 20

    def __init__(
        self,
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=False,
        comm=None,
    ) -> None:
        assert num_nvl_bytes % 128 == num_rdma_bytes % 128 == 0
        assert not low_latency_mode, "not part of the stand-in"
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        dist.all_gather_object([None] * self.group_size, self.rank, group)  # as device ids and handles are

    @staticmethod
    def get_dispatch_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 24, 256, 6, 128)

    @staticmethod
    def get_combine_config(num_ranks):
        assert num_ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 10, 256, 6, 128)

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        assert topk_idx.dim() == 2
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == torch.int64
        assert num_experts % self.group_size == 0
        assert topk_idx.shape[1] <= 32
        assert bool(((topk_idx >= -1) & (topk_idx < num_experts)).all())
        is_of_expert_TE = topk_idx.new_zeros(len(topk_idx), num_experts + 1, dtype=torch.bool)
        is_of_expert_TE = is_of_expert_TE.scatter_(1, topk_idx % (num_experts + 1), True)[:, :-1]
        is_in_rank_TR = is_of_expert_TE.unflatten(1, (self.group_size, -1)).any(2)
        to_expert = is_of_expert_TE.sum(0, dtype=torch.int32)
        return is_in_rank_TR.sum(0, dtype=torch.int32), None, to_expert, is_in_rank_TR, EventOverlap()

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        assert expert_alignment == 1, "not part of the stand-in"
        assert num_worst_tokens == 0, "not part of the stand-in"
        self._check_rows(x)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            is_token_in_rank, send, receive = handle
            assert len(is_token_in_rank) == len(x)
            return self._exchange(x[_sent(is_token_in_rank)], send, receive), None, None, None, None, EventOverlap()
        assert is_token_in_rank.shape == (len(x), self.group_size)
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert topk_idx.shape == topk_weights.shape == (len(x), topk_idx.shape[1])
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        assert topk_weights.dtype == torch.float32
        send, ones = num_tokens_per_rank.tolist(), [1] * self.group_size
        receive = self._exchange(num_tokens_per_rank, ones, ones).tolist()
        num_experts = len(num_tokens_per_expert) // self.group_size
        sent = _sent(is_token_in_rank)
        recv_x, recv_idx, recv_weights = (self._exchange(t[sent], send, receive) for t in (x, topk_idx, topk_weights))
        recv_idx = recv_idx - self.rank * num_experts
        abroad = (recv_idx < 0) | (recv_idx >= num_experts)
        recv_idx = recv_idx.masked_fill(abroad, -1)
        counts = [int((recv_idx == expert).sum()) for expert in range(num_experts)]
        handle = (is_token_in_rank, send, receive)
        return recv_x, recv_idx, recv_weights.masked_fill(abroad, 0), counts, handle, EventOverlap()

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        assert bias is None, "not part of the stand-in"
        self._check_rows(x)
        is_token_in_rank, send, receive = handle
        assert len(x) == sum(receive)
        sent, num_tokens = _sent(is_token_in_rank), len(is_token_in_rank)

        def reduce(rows):
            returned = self._exchange(rows, receive, send)
            total = torch.zeros(num_tokens, rows.shape[1])
            for tokens, block in zip(sent.split(send), returned.split(send), strict=True):
                total[tokens] += block
            return total.to(rows.dtype)

        if topk_weights is None:
            return reduce(x), None, EventOverlap()
        assert topk_weights.is_contiguous()
        assert topk_weights.dtype == torch.float32
        assert len(topk_weights) == len(x)
        return reduce(x), reduce(topk_weights), EventOverlap()

    def _check_rows(self, x) -> None:
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        assert x.shape[1] % 16 == 0

    def _exchange(self, rows, send, receive):
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=self.group)
        return received


def _sent(is_token_in_rank):
    """The token of each row that is sent, by rank and then by token."""
    return is_token_in_rank.t().nonzero()[:, 1]
