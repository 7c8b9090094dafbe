"""What benchmarks/layer.py times: one problem, its plain reference, its limit, and the layers that solve it.

Shape letters: T tokens of this rank, H hidden, F expert FFN width, E experts, L experts of this rank, K experts per
token, R rows of one expert under perfect balance.
"""

import contextlib
import io
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import emulation
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer; `tokens` are those of each rank."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int

    def flops(self) -> int:
        """Multiplications and additions of the experts on one rank: three matrices, forward, dX and dW."""
        return 3 * 2 * self.tokens * self.top_k * 3 * self.hidden * self.ffn


@dataclass(frozen=True)
class Problem:
    """Weights that all ranks share and the tokens of this rank."""

    shape: Shape
    rank: int
    ranks: int
    hidden_TH: Tensor
    grad_TH: Tensor
    router_EH: Tensor
    gate_up_EHF: Tensor
    """Gate columns first, then up: [E, H, 2F]."""
    down_EFH: Tensor

    def own(self, whole_E: Tensor) -> Tensor:
        """The slice of this rank's experts."""
        return whole_E.chunk(self.ranks)[self.rank]


def make_problem(shape: Shape, rank: int, ranks: int) -> Problem:
    """Draw weights (the same on every rank) and tokens (different ones)."""
    weights = torch.Generator().manual_seed(0)
    tokens = torch.Generator().manual_seed(1 + rank)
    return Problem(
        shape,
        rank,
        ranks,
        hidden_TH=torch.randn(shape.tokens, shape.hidden, generator=tokens),
        grad_TH=torch.randn(shape.tokens, shape.hidden, generator=tokens),
        router_EH=torch.randn(shape.experts, shape.hidden, generator=weights) / shape.hidden**0.5,
        gate_up_EHF=torch.randn(shape.experts, shape.hidden, 2 * shape.ffn, generator=weights) / shape.hidden**0.5,
        down_EFH=torch.randn(shape.experts, shape.ffn, shape.hidden, generator=weights) / shape.ffn**0.5,
    )


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, where gate is the first half of the last dimension."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def reference(problem: Problem) -> dict[str, Tensor]:
    """Output and gradients by a plain loop over all experts, without any dispatch."""
    leaves = (problem.hidden_TH, problem.router_EH, problem.gate_up_EHF, problem.down_EFH)
    hidden_TH, router_EH, gate_up_EHF, down_EFH = (leaf.clone().requires_grad_() for leaf in leaves)
    top_TK, expert_TK = (hidden_TH @ router_EH.T).topk(problem.shape.top_k)
    weight_TK = top_TK.softmax(dim=-1)
    output_TH = torch.zeros_like(hidden_TH)
    for expert, (gate_up_HF, down_FH) in enumerate(zip(gate_up_EHF.unbind(), down_EFH.unbind(), strict=True)):
        token, slot = (expert_TK == expert).nonzero(as_tuple=True)
        rows = swiglu(hidden_TH[token] @ gate_up_HF) @ down_FH
        output_TH = output_TH.index_add(0, token, rows * weight_TK[token, slot, None])
    output_TH.backward(problem.grad_TH)
    for weight in (gate_up_EHF, down_EFH):
        dist.all_reduce(weight.grad)  # an expert's gradient counts the tokens of all ranks
    return {
        "output": output_TH.detach(),
        "input gradient": hidden_TH.grad,
        "router gradient": router_EH.grad,
        "gate_up gradient": problem.own(gate_up_EHF.grad),
        "down gradient": problem.own(down_EFH.grad),
    }


def loads(problem: Problem) -> Tensor:
    """Pairs that each expert gets from all ranks."""
    expert_TK = (problem.hidden_TH @ problem.router_EH.T).topk(problem.shape.top_k).indices
    load_E = expert_TK.flatten().bincount(minlength=problem.shape.experts)
    dist.all_reduce(load_E)
    return load_E


class Limit:
    """The GEMMs of perfectly balanced experts into buffers that exist already, and a bare exchange of their rows."""

    def __init__(self, problem: Problem):
        shape = problem.shape
        L = shape.experts // problem.ranks
        R = shape.tokens * shape.top_k // L

        def stack(*size: int) -> Tensor:
            return torch.randn(L, *size)

        gate_up, down = problem.own(problem.gate_up_EHF).contiguous(), problem.own(problem.down_EFH).contiguous()
        x, dx, y, dy = (stack(R, shape.hidden) for _ in range(4))
        h, dh = stack(R, 2 * shape.ffn), stack(R, 2 * shape.ffn)
        a, da = stack(R, shape.ffn), stack(R, shape.ffn)
        forward = [(x, gate_up, h), (a, down, y)]
        backward = [(dy, down.mT, da), (a.mT, dy, torch.empty_like(down))]
        backward += [(dh, gate_up.mT, dx), (x.mT, dh, torch.empty_like(gate_up))]
        self.batched = forward + backward
        self.single = [gemm for stacks in (forward, backward) for gemm in _by_expert(stacks)]
        self.rows, self.received = x.view(-1, shape.hidden), dx.view(-1, shape.hidden)
        self.alone = problem.ranks == 1

    def parts(self) -> dict[str, Callable[[], None]]:
        """What is timed; the limit is the faster of the first two, plus the third."""
        gemms = {"loop of mm": self.loop, "bmm": self.bmm}
        return gemms if self.alone else gemms | {"all-to-all": self.exchange}

    def loop(self) -> None:
        """One GEMM at a time."""
        for left, right, out in self.single:
            torch.mm(left, right, out=out)

    def bmm(self) -> None:
        """All experts in one call."""
        for left, right, out in self.batched:
            torch.bmm(left, right, out=out)

    def exchange(self) -> None:
        """Dispatch and combine, forward and backward; with equal splits a rank's own share stays where it is."""
        for _ in range(4):
            dist.all_to_all_single(self.received, self.rows)


def _by_expert(stacks: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The same GEMMs expert after expert, so that the rows of one stay in cache from GEMM to GEMM."""
    by_stack = [zip(*(tensor.unbind() for tensor in stack), strict=True) for stack in stacks]
    return [gemm for expert in zip(*by_stack, strict=True) for gemm in expert]


class UnavailableError(Exception):
    """A competitor that cannot run on this machine."""


class Competitor:
    """A whole MoE layer, loaded with the problem's weights."""

    name: str
    layer: nn.Module

    def __init__(self, problem: Problem):
        self.hidden_TH = problem.hidden_TH.clone().requires_grad_()
        self.grad_TH = problem.grad_TH
        self.layer = self.build(problem)
        with torch.no_grad():
            self.router_weight().copy_(problem.router_EH)
            self.load_experts(problem.own(problem.gate_up_EHF), problem.own(problem.down_EFH))

    def build(self, problem: Problem) -> nn.Module:
        raise NotImplementedError

    def forward(self, hidden_TH: Tensor) -> Tensor:
        raise NotImplementedError

    def router_weight(self) -> nn.Parameter:
        raise NotImplementedError

    def load_experts(self, gate_up_LHF: Tensor, down_LFH: Tensor) -> None:
        raise NotImplementedError

    def expert_gradients(self) -> tuple[Tensor, Tensor]:
        """In the problem's layout."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop the gradients of the step before."""
        self.hidden_TH.grad = None
        self.layer.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """What is timed: forward and backward."""
        output_TH = self.forward(self.hidden_TH)
        output_TH.backward(self.grad_TH)
        return output_TH

    def results(self) -> dict[str, Tensor]:
        """One step's output and gradients, under the names that `reference` gives them."""
        self.clear()
        output_TH = self.step().detach()
        gate_up_LHF, down_LFH = self.expert_gradients()
        return {
            "output": output_TH,
            "input gradient": self.hidden_TH.grad,
            "router gradient": self.router_weight().grad,
            "gate_up gradient": gate_up_LHF,
            "down gradient": down_LFH,
        }


class Ours(Competitor):
    """moe_dist.MoELayer as a user gets it."""

    name = "moe_dist"

    def build(self, problem: Problem) -> nn.Module:
        from moe_dist import MoELayer
        from moe_dist.config import MoEConfig, RoutingConfig

        shape = problem.shape
        return MoELayer(
            shape.hidden,
            MoEConfig(num_experts=shape.experts, ffn_size=shape.ffn),
            RoutingConfig(score="softmax_top_k", top_k=shape.top_k),
            expert_parallel_group=dist.group.WORLD if problem.ranks > 1 else None,
        )

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH)

    def router_weight(self) -> nn.Parameter:
        return self.layer.router.weight

    def load_experts(self, gate_up_LHF: Tensor, down_LFH: Tensor) -> None:
        self.layer.experts.w_gate_up.copy_(gate_up_LHF)
        self.layer.experts.w_down.copy_(down_LFH)

    def expert_gradients(self) -> tuple[Tensor, Tensor]:
        return self.layer.experts.w_gate_up.grad, self.layer.experts.w_down.grad


class LinearExperts(Competitor):
    """Peers that keep every expert as two linear modules, whose weights are [out, in]."""

    def linears(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        raise NotImplementedError

    def load_experts(self, gate_up_LHF: Tensor, down_LFH: Tensor) -> None:
        for (gate_up, down), gate_up_HF, down_FH in zip(self.linears(), gate_up_LHF, down_LFH, strict=True):
            gate_up.copy_(gate_up_HF.T)
            down.copy_(down_FH.T)

    def expert_gradients(self) -> tuple[Tensor, Tensor]:
        gate_up, down = zip(*((gate_up.grad.T, down.grad.T) for gate_up, down in self.linears()), strict=True)
        return torch.stack(gate_up), torch.stack(down)


class Megatron(LinearExperts):
    """Megatron-Core's MoELayer: alltoall dispatcher, SequentialMLP, no TransformerEngine."""

    name = "megatron"
    fused_swiglu = False

    def build(self, problem: Problem) -> nn.Module:
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe.moe_layer import MoELayer

        emulation.run_megatron_on_cpu()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(expert_model_parallel_size=problem.ranks)
        spec = get_moe_module_spec(use_te=False, num_experts=problem.shape.experts, moe_grouped_gemm=False)
        return MoELayer(_megatron_config(problem, self.fused_swiglu), spec.submodules)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH[:, None])[0][:, 0]  # Megatron's layout is [sequence, batch, hidden]

    def router_weight(self) -> nn.Parameter:
        return self.layer.router.weight

    def linears(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for expert in self.layer.experts.local_experts:
            yield expert.linear_fc1.weight, expert.linear_fc2.weight


class MegatronFused(Megatron):
    """The same with its SwiGLU through torch.compile, which needs a C++ compiler."""

    name = "megatron_fused"
    fused_swiglu = True

    def build(self, problem: Problem) -> nn.Module:
        if not shutil.which("g++"):
            raise UnavailableError("torch.compile finds no C++ compiler")
        return super().build(problem)


def _megatron_config(problem: Problem, fused_swiglu: bool):
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = problem.shape
    return TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=problem.ranks,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=fused_swiglu,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


class DeepSpeed(LinearExperts):
    """DeepSpeed's native MoE without drops: every expert is padded to the fullest one."""

    name = "deepspeed"

    def build(self, problem: Problem) -> nn.Module:
        _start_deepspeed()
        from deepspeed.moe.layer import MoE

        shape = problem.shape
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its groups by print
            layer = MoE(
                shape.hidden,
                _SwiGLUExpert(shape),
                num_experts=shape.experts,
                ep_size=problem.ranks,
                k=shape.top_k,
                drop_tokens=False,
                top2_2nd_expert_sampling=False,  # the default draws the second expert at random
            )
            layer.set_deepspeed_parallelism()
        return layer

    def forward(self, hidden_TH: Tensor) -> Tensor:
        return self.layer(hidden_TH)[0]

    def router_weight(self) -> nn.Parameter:
        return self.layer.deepspeed_moe.gate.wg.weight

    def linears(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for expert in self.layer.deepspeed_moe.experts.deepspeed_experts:
            yield expert.gate_up.weight, expert.down.weight


class _SwiGLUExpert(nn.Module):
    """The expert that DeepSpeed's layer copies."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


def _start_deepspeed() -> None:
    """Wrap the running process group, quietly and without building DeepSpeed's C++ extension for inference."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)


COMPETITORS = {peer.name: peer for peer in (Ours, Megatron, MegatronFused, DeepSpeed)}
