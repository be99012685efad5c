"""Sizes of miniatures by the names of config fields, and what these names don't determine."""

from __future__ import annotations

_SIZES = {
    64: "hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim attention_hidden_size "
    "intermediate_size moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp ffn_dim n_inner "
    "encoder_ffn_dim decoder_ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size dense_intermediate_size "
    "nemo_conv_channels expert_ffn_hidden_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size lru_width mamba_d_ssm ple_embed_dim ngram_vocab_size_base",
    24: "q_lora_rank",
    # with few index heads many of an indexer's scores are exactly 0, and rounding picks the tokens
    16: "index_n_heads indexer_n_heads head_dim swa_head_dim dim_head kv_channels attention_head_dim v_head_dim "
    "kv_lora_rank qk_nope_head_dim linear_head_dim indexer_head_dim linear_key_head_dim linear_value_head_dim "
    "mamba_d_head mamba_head_dim mamba_d_state ssm_state_size hidden_size_per_layer_input",
    8: "rotary_dim qk_rope_head_dim index_topk indexer_budget mamba_n_heads mamba_num_heads mamba_chunk_size "
    "laurel_rank",
    # shorter windows are stored exactly
    130: "sliding_window sliding_window_size window_size local_attention attention_chunk_size attention_window_size",
    4: "num_attention_heads swa_num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
    "decoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
    "linear_num_heads linear_num_value_heads",
    2: "num_key_value_heads swa_num_key_value_heads num_kv_heads encoder_layers decoder_layers num_blocks "
    "num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token linear_num_key_heads zero_expert_num",
    1: "n_group topk_group num_expert_group",
    128: "vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
NEEDED = ("head_dim", "num_key_value_heads", "n_routed_experts")  # set even if they are None by default
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}  # without an end token generation has a known length
OTHER_TOKEN = 120  # any other special token; prompts don't have it
# Switches that aren't part of an architecture, set in every config that has them
SWITCHES = {"use_cache": True, "is_decoder": True, "tie_word_embeddings": False}
LEFT_ALONE = ("id2label", "label2id", "rope_parameters")

# Fields of the default config before it is shrunk, where the library's default is unlike any checkpoint
_INDEXER = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048}
_INDEXER |= {"indexer_compress_ratio": 2}
_NO_INPUT_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
DEFAULTS: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "gemma4": {"text_config": {"num_kv_shared_layers": 12}},
    "gemma4_assistant": {"text_config": _NO_INPUT_PER_LAYER},
    "gemma4_text": {"num_kv_shared_layers": 12},
    "granitemoehybrid": {"layer_types": [*["linear_attention"] * 5, "full_attention", *["linear_attention"] * 2] * 4},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": {**_INDEXER, "ple_layer_ids": [1], "eos_token_id": 7},
}
# Fields that their names don't determine: sizes that depend on each other, and defaults unlike any checkpoint
_CONV = {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}
_ADAPTERS = {"adapter_in_dim": 64, "adapter_out_dim": 64, "adapter_input_size": 64}
OVERRIDES: dict[str, dict] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": _ADAPTERS, "audio_config": _ADAPTERS},
    "granitemoehybrid": {"shared_intermediate_size": 64},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": {**_CONV, "full_attn_idxs": [1, 3]},
    "lfm2_moe": _CONV,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "full_attention"], "chunk_size": 8,
    },
    "qwen4_exp_text": {"eos_token_id": 999},  # it needs one: one that no model of 128 tokens generates
    "recurrent_gemma": {"num_hidden_layers": 6},
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 4},
    "zamba2": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "num_query_groups": 4, "mamba_headdim": 16,
        "chunk_size": 8,
    },
}  # fmt: skip
