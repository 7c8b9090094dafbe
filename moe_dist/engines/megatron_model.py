"""moe_dist's transformer as a GPTModel of Megatron-Core, with parts of ours where Megatron's own do something else.

Ours are the MoE layer; the norm, where no fused one is installed; attention over heads by PyTorch, where TransformerEngine is not
installed or documents are kept apart; and recomputation, which must not count loads twice.

Shape letters: S tokens of a sequence, B sequences, N query heads, M key-value heads, D head size, H hidden.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moe_dist.config import Config
from moe_dist.config.layout import layers_of_stage, moe_layers
from moe_dist.engines.megatron_fused import has_transformer_engine, rms_norm
from moe_dist.engines.megatron_layer import LayerOptions, MegatronMoELayer, layer_spec


def transformer_config(config: Config, autocast: bool) -> TransformerConfig:
    """Megatron's config of the model. Weights are float32; `autocast`: computed in bfloat16."""
    model, parallel = config.model, config.parallel
    interleaved = parallel.pipeline_interleaving > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads or model.num_heads,
        kv_channels=model.head_size or model.hidden_size // model.num_heads,
        ffn_hidden_size=model.ffn_size,
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm == "head",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        perform_initialization=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        enable_autocast=autocast,
        autocast_dtype=torch.bfloat16,
        # The engine divides the loss itself, by the targets of the whole step: gradients are then summed over all ranks.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.pipeline_interleaving if interleaved else None,
        # With two stages both neighbours are one rank: a batch of sends would mix up activations and gradients.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        sequence_parallel=config.engine.sequence_parallel,
    )


def build_model(
    config: Config, megatron: TransformerConfig, vocab_size: int, options: LayerOptions, chunk: int
) -> GPTModel:
    """A chunk of this rank's pipeline stage, without weights but for those of the MoE layers. Inside the engine's context.

    Args:
        vocab_size: a multiple of the tensor-parallel ranks.
        chunk: 0 where stages are not interleaved.
    """
    from megatron.core import parallel_state

    with_experts, recomputed = set(moe_layers(config)), config.model.activation_checkpointing
    stage, norm = parallel_state.get_pipeline_model_parallel_rank(), rms_norm(config.engine.emulate_cuda)
    is_last = (stage, chunk) == (config.parallel.pipeline - 1, config.parallel.pipeline_interleaving - 1)
    specs = []
    for number in layers_of_stage(config, stage)[chunk]:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.model.qk_norm == "head")
        parts = spec.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
        parts.self_attention.submodules.core_attention = core_attention_of(config)
        if config.model.qk_norm == "head":
            parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = norm
        if number in with_experts:
            parts.mlp = layer_spec(options)
        if recomputed == "all" or (recomputed != "none" and number in recomputed):
            spec = ModuleSpec(module=CheckpointedLayer, submodules=parts)
        specs.append(spec)
    return GPTModel(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm),
        vocab_size=vocab_size,
        max_sequence_length=config.training.sequence_length,
        pre_process=(stage, chunk) == (0, 0),
        post_process=is_last,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        vp_stage=chunk if config.parallel.pipeline_interleaving > 1 else None,
    )


def core_attention_of(config: Config) -> type:
    """TransformerEngine's attention where it is installed; it does not take the mask of documents."""
    if not has_transformer_engine() or config.engine.emulate_cuda or config.data.separate_documents:
        return CoreAttention
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


class CoreAttention(nn.Module):
    """Scaled dot-product attention of the heads of this rank, causal where no mask is given."""

    def __init__(self, config: TransformerConfig, **ignored: Any) -> None:
        super().__init__()
        assert not config.attention_dropout

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBMD: torch.Tensor,
        value_SBMD: torch.Tensor,
        mask_B1SS: torch.Tensor | None,
        **ignored: Any,
    ) -> torch.Tensor:
        """[S, B, N D]. `mask_B1SS`: bool, True where a query may not look, causality included, as Megatron has it."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBMD, value_SBMD))
        out_BNSD = functional.scaled_dot_product_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attn_mask=None if mask_B1SS is None else ~mask_B1SS,
            is_causal=mask_B1SS is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


class CheckpointedLayer(TransformerLayer):
    """A layer whose activations are recomputed in backward, with the facts of the tokens that it was called with."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        record = self.mlp.options.record if isinstance(self.mlp, MegatronMoELayer) else None
        tokens = None if record is None else record.tokens

        def run(*args: Any, **kwargs: Any) -> Any:
            if record is None:
                return TransformerLayer.forward(self, *args, **kwargs)
            now, record.tokens = record.tokens, tokens
            try:
                return TransformerLayer.forward(self, *args, **kwargs)
            finally:
                record.tokens = now

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def document_mask(document_BS: torch.Tensor | None) -> torch.Tensor | None:
    """bool [B, 1, S, S], True where a query may not look; None without documents."""
    if document_BS is None:
        return None
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return ~same_BSS.tril()[:, None]
