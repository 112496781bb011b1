"""What makes each of transformers' configurations small: sizes by name, and what single types need beside them."""

from __future__ import annotations

from typing import Any

__all__ = ["EXCEPTIONS", "LEFT_OUT", "SIZES"]


def _all(value: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


#: Name of a configuration field → its value in a tiny model.
SIZES: dict[str, int] = {
    # depth
    **_all(
        4,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks depth",
    ),
    # widths
    **_all(
        32,
        "hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size "
        "word_embed_proj_dim backbone_hidden_size attention_hidden_size lru_width hidden_size_global",
    ),
    **_all(16, "pronunciation_embed_dim shape_embed_dim prompt_mid_dim ple_embed_dim"),
    # heads
    **_all(
        4,
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads "
        "linear_num_value_heads rotary_dim",
    ),
    **_all(
        2,
        "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups",
    ),
    # A sum of few rectified scores is often exactly zero, and which of several zeros is among the largest is chance.
    **_all(16, "index_n_heads"),
    **_all(
        8,
        "head_dim d_head dim_head swa_head_dim attention_head_size kv_channels linear_head_dim linear_key_head_dim "
        "linear_value_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_rel",
    ),
    **_all(16, "kv_lora_rank q_lora_rank o_lora_rank index_head_dim rel_extent"),
    **_all(2, "o_groups"),
    # feed-forward
    **_all(
        64,
        "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim "
        "d_inner dff dim_ff ffn_hidden_size feed_forward_size",
    ),
    **_all(
        32,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size",
    ),
    # experts
    **_all(4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_all(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num"),
    **_all(
        1,
        "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
        "first_k_dense_replace num_dense_layers moe_layer_start_index",
    ),
    **_all(3, "moe_layer_end_index"),
    **_all(16, "router_hidden_size"),
    # state spaces
    **_all(
        8,
        "state_size ssm_state_size mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim "
        "mamba_headdim mamba_chunk_size chunk_size",
    ),
    **_all(64, "mamba_d_ssm"),
    **_all(4, "mamba_dt_rank time_step_rank"),
    **_all(2, "n_mamba_heads n_groups"),
    # windows, shorter than the texts they are tried with
    **_all(
        4, "sliding_window sliding_window_size attention_window_size attention_chunk_size local_attention index_topk"
    ),
    **_all(4, "window_size"),
    # vocabulary and positions
    **_all(128, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    **_all(32, "pronunciation_vocab_size shape_vocab_size"),
    **_all(64, "encoder_hash_byte_group_vocab ngram_vocab_size_base"),
    **_all(
        128,
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
        "max_source_positions model_max_length",
    ),
    # other parts
    **_all(8, "hidden_size_per_layer_input laurel_rank adapter_rank hc_lowrank gated_norm_rank"),
    **_all(4, "prompt_length prompt_types"),
    **_all(16, "position_bias_num_buckets"),
}

_HYBRID = ["linear_attention", "full_attention"] * 2

_DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_GEMMA4 = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "ple_layer_ids": [3], "ple_embed_dim": 32, "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
}  # fmt: skip

#: Model type → settings that its configuration needs, or that make all its kinds of block appear in four.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots3_note": _DOTS3,
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _HYBRID},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "reformer": {"axial_pos_embds": False, "num_hashes": 1},
    "rwkv": {"rescale_every": 2},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attention_hidden_size": 64, "attn_layer_period": 2, "attn_layer_offset": 0},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}

#: Model type → why it is not tried.
LEFT_OUT: dict[str, str] = {
    "gemma3n": "its picture tower needs timm; what reads the text is gemma3n_text",
    "gemma4_assistant": "it drafts for another model and reads that model's keys and values",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's keys and values",
    "musicgen": "its tokens are audio codes of several codebooks at once",
    "musicgen_melody": "its tokens are audio codes of several codebooks at once",
}
