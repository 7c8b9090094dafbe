"""A training script on DeepSpeed with moe_dist's MoE layer: deepspeed --num_gpus 2 docs/examples/deepspeed_moe.py"""

import argparse

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from moe_dist.config import BiasConfig, LoadBalanceLossConfig, LossesConfig, MoEConfig, RoutingConfig
from moe_dist.engines.deepspeed import moe_layer, parameter_groups
from moe_dist.routing import Tokens
from moe_dist.routing.balance import sum_over_ranks

MICRO_BATCHES, VOCABULARY, HIDDEN = 2, 64, 32
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1_000_000},
}
MOE, LOSSES = MoEConfig(num_experts=8, ffn_size=48), LossesConfig(load_balance=LoadBalanceLossConfig(coefficient=0.01))
ROUTING = RoutingConfig(top_k=2, score="sigmoid", bias=BiasConfig(rule="sign", rate=1e-3), losses=LOSSES)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCABULARY, HIDDEN), nn.RMSNorm(HIDDEN)
        self.moe = moe_layer(HIDDEN, MOE, ROUTING, expert_parallel=2)
        self.output = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_BS: torch.Tensor) -> torch.Tensor:
        hidden_BSH = self.embedding(input_BS)
        tokens = Tokens(num_sequences=len(input_BS), share=1 / MICRO_BATCHES)  # of the auxiliary losses of a step
        return self.output(hidden_BSH + self.moe(self.norm(hidden_BSH), tokens))


parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)  # added by the launcher
parser.parse_args()
deepspeed.init_distributed()
torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-2)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
generator, router = torch.Generator().manual_seed(dist.get_rank()), model.moe.router
for step in range(20 * MICRO_BATCHES):
    input_BS = torch.randint(VOCABULARY, (4, 16), generator=generator).to(engine.device)
    loss = nn.functional.cross_entropy(engine(input_BS).flatten(0, 1), (input_BS.flatten() * 5 + 1) % VOCABULARY)
    engine.backward(loss)
    engine.step()
    if (step + 1) % MICRO_BATCHES == 0:  # a step of the optimiser is done: the bias follows the loads of all ranks
        (totals,) = sum_over_ranks([router.balance], dist.group.WORLD)
        router.update(totals, ROUTING.bias.rate)
        if dist.get_rank() == 0:
            print(f"step {(step + 1) // MICRO_BATCHES}: loss {loss:.4f}, load {totals['load_E'].tolist()}", flush=True)
