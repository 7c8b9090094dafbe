"""What a run is. Every key of a YAML config is a field below, and its docstring is its documentation.

This package imports no torch, so that a wrong config is reported in well under a second.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from moe_dist.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, Switch
from moe_dist.config.routing import RoutingConfig

BYTE_VOCABULARY = 257
"""256 bytes and the document boundary."""
MOST_EXPERTS = 32767
"""Experts, or slices of them, are sorted by 16-bit keys."""


class ModelConfig(Section):
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    hidden_size: PositiveInt = 256
    """Width of the residual stream."""
    num_layers: PositiveInt = 4
    """Transformer layers, dense and MoE together."""
    num_heads: PositiveInt = 4
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key and value heads; must divide num_heads. Default: num_heads."""
    head_size: PositiveInt | None = None
    """Width of one head, even. Default: hidden_size / num_heads."""
    ffn_size: PositiveInt = 704
    """Width of the feed-forward part of the dense layers."""
    num_dense_layers: NonNegativeInt = 0
    """The first layers that are dense whatever moe_every says."""
    moe_every: PositiveInt = 1
    """After the dense layers, every n-th layer is an MoE layer (1: all of them)."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. Default: what the data needs (257 for bytes)."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """RMSNorm of queries and keys: per head (Qwen3), over the whole width (OLMoE), or none."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    norm_epsilon: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: Switch = True
    """Use the input embedding as output projection."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation; output projections use init_std / sqrt(2 num_layers)."""
    activation_checkpointing: Literal["none", "all"] | list[NonNegativeInt] = "none"
    """Layers whose activations are recomputed in backward: none, all, or a list of layer numbers."""
    compile: Switch = False
    """Run the attention and the dense FFN of every layer through torch.compile."""


class MoEConfig(Section):
    """The routed experts and the shared expert of every MoE layer."""

    num_experts: Annotated[int, Field(gt=0, le=MOST_EXPERTS, strict=True)] = 8
    """Routed experts of a layer, over all ranks."""
    ffn_size: PositiveInt = 704
    """FFN width of one routed expert."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu: (silu(x Wg) * x Wu) Wd. gelu: gelu(x Wu) Wd."""
    num_shared_experts: NonNegativeInt = 0
    """Experts that every token uses, computed as one FFN of this many times ffn_size."""
    shared_gate: Switch = False
    """Multiply the shared experts' output by sigmoid(x w), as Qwen2-MoE does."""
    backend: Literal["auto", "loop", "cpu", "grouped_mm", "triton", "transformer_engine", "sonic", "fp8"] = "auto"
    """How experts are computed. loop: plain reference; cpu: GEMMs expert by expert, with the rest done in cache;
    grouped_mm: torch.nn.functional.grouped_mm; auto: cpu on CPUs, grouped_mm on GPUs. On some GPUs (docs/backends.md; not run
    on hardware): triton: this package's kernels; transformer_engine, sonic: those packages; fp8: torch's scaled grouped GEMM."""
    recompute: Literal["activation", "experts"] = "activation"
    """What backward computes again. activation: keep the first GEMM's output; experts: keep nothing, repeat that GEMM."""


class ParallelConfig(Section):
    """How the ranks are divided. Data parallelism is what is left; experts fold over the data ranks."""

    expert: PositiveInt = 1
    """Ranks over which the experts of a layer are spread."""
    expert_tensor: PositiveInt = 1
    """Ranks over which the FFN width of one expert is split: expert x expert_tensor ranks then share the experts of a layer."""
    tensor: PositiveInt = 1
    """Ranks over which attention and dense layers are split."""
    pipeline: PositiveInt = 1
    """Pipeline stages."""
    dispatch: Literal["flat", "hierarchical", "deepep"] = "flat"
    """How tokens reach the ranks of their experts. flat: one all-to-all over the expert-parallel group, a row for each expert
    of a token; hierarchical: between nodes first, where a token crosses once for each node that has experts of it, then
    inside the node; deepep: by DeepEP's kernels (CUDA, bfloat16, dropless routing; not run on hardware)."""
    ranks_per_node: PositiveInt | None = None
    """Consecutive ranks that share a node, for dispatch: hierarchical and the records of bytes between nodes. Default: as many
    as the launcher started on a node."""
    overlap_chunks: PositiveInt | Literal["auto"] = 1
    """Parts into which a rank's experts are divided, so that the rows of one part travel while those of another are
    computed. Results are the same bits for any number. auto: 1, 2 or 4, whichever is fastest at the start of the run."""
    expert_map: list[NonNegativeInt] | None = None
    """For each expert the expert-parallel rank that owns it. Default: contiguous equal blocks."""


class DataConfig(Section):
    """Text as bytes, packed into sequences; token 256 stands between documents."""

    source: Literal["stdlib", "files"] = "stdlib"
    """stdlib: the Python standard library's source files, on every machine, offline; files: those under `paths`."""
    paths: list[str] = Field(default=[])
    """Files or folders (read recursively) for source: files."""
    suffixes: list[str] = Field(default=[".py", ".txt", ".md"])
    """Files of these endings are taken from the folders in `paths`."""
    holdout_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the files, chosen by a hash of their path, kept whole for evaluation."""
    separate_documents: Switch = False
    """Attention does not cross document boundaries."""


class OptimizerConfig(Section):
    """Weight decay applies to matrices only."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Both are fused; AdamW decouples the weight decay."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's decay rates."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices, experts and embeddings; norms have none."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global norm; null: no clipping."""


class ScheduleConfig(Section):
    """Learning rate over the run, as a factor of optimizer.learning_rate."""

    name: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: the peak, or a cosine down to final_fraction of it at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Linear rise from 0 over this many steps."""
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """cosine ends at this fraction of the peak."""


class EvaluationConfig(Section):
    """Loss on the held-out files."""

    interval: PositiveInt | None = None
    """Steps between evaluations; one more after the last step. null: never."""
    tokens: PositiveInt = 65536
    """Held-out tokens used (fewer if there are not so many), rounded down to whole sequences."""


class CheckpointConfig(Section):
    """Checkpoints in DIR/checkpoints."""

    interval: PositiveInt | None = None
    """Steps between checkpoints; one more after the last step. null: only on Ctrl-C or SIGTERM and at the end."""
    keep: PositiveInt = 2
    """The last n are kept."""


class TrainingConfig(Section):
    """The loop."""

    steps: PositiveInt = 100
    """Optimiser steps."""
    global_batch_size: PositiveInt = 16
    """Sequences of an optimiser step, over all ranks: the same for every layout."""
    micro_batch_size: PositiveInt | None = None
    """Sequences of one forward on one rank. Default: all of the rank's share, without accumulation."""
    sequence_length: PositiveInt = 256
    """Tokens of a sequence."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """bfloat16 is autocast with float32 weights; auto: bfloat16 where the device computes it fast, else float32."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Initial weights and data order are functions of it."""
    max_nonfinite_steps: PositiveInt = 3
    """After this many steps in a row without a finite loss and gradient (each is skipped) the run ends."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class TelemetryConfig(Section):
    """Records in DIR."""

    interval: PositiveInt | None = 10
    """Steps between lines of metrics.jsonl and load/rank_*.jsonl. null: no such lines, nothing is counted, and of metrics.jsonl
    the evaluations are left."""
    timed_steps: PositiveInt = 1
    """Steps between two lines whose stages are timed."""
    peak_flops: PositiveFloat | None = None
    """FLOP/s of one device at this precision, for the model FLOP/s utilisation. Default: in bfloat16 what the makers of common
    GPUs give for dense matrices; of others no utilisation is recorded."""
    report: Switch = True
    """Write DIR/report.html when training ends; `moe-dist report DIR` writes it at any time."""


class EngineConfig(Section):
    """What runs the model on the ranks."""

    name: Literal["native", "deepspeed", "megatron"] = "native"
    """native: PyTorch alone; deepspeed: DeepSpeed's engine and ZeRO optimisers (docs/deepspeed.md); megatron: Megatron-Core's
    GPTModel, schedules and optimiser around our MoE layers (docs/megatron.md)."""
    sharding: Literal["full", "replicate"] = "full"
    """Of the native engine. full: parameters, gradients and moments sharded over the data ranks by FSDP2; replicate: whole on
    each rank, like DDP."""
    zero_stage: Annotated[int, Field(ge=0, le=3, strict=True)] = 1
    """Of the deepspeed engine: what ZeRO shards over the ranks that hold the same weights. 0: nothing; 1: moments; 2: gradients
    too; 3: weights too, experts included, with parallel.expert: 1."""
    deepspeed: dict[str, Any] = Field(default={})
    """Of the deepspeed engine: keys of DeepSpeed's own configuration, merged over the one that this config makes."""
    distributed_optimizer: Switch = True
    """Of the megatron engine: moments and main weights spread over the data ranks by Megatron's distributed optimizer."""
    emulate_cuda: Switch = False
    """Of the megatron engine: run Megatron-Core on CPUs, which it is not made for: to try a layout, and for tests."""


class Config(Section):
    """A whole run."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    routing: RoutingConfig = RoutingConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    engine: EngineConfig = EngineConfig()
