"""What modules call the sizes that a cut changes: attributes of layers, of attention, of experts."""

# Sizes of a layer by the dimension of its weight that they state.
LAYER_SIZES = {
    "out_features": 0, "in_features": 1, "out_channels": 0, "in_channels": 1, "num_embeddings": 0, "embedding_dim": 1,
    "nf": 1, "nx": 0, "num_features": 0, "num_channels": 0, "groups": 0,
}  # fmt: skip
# Query heads, key-value heads, query heads that share one, channels of all query heads and of all key-value heads.
QUERY_HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_attn_heads", "nhead", "num_query_heads",
    "attention_heads",
)  # fmt: skip
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "num_heads_kv")
HEADS_PER_GROUP = ("num_key_value_groups", "n_rep")
INNER_WIDTH = (
    "all_head_size", "embed_dim", "hidden_size", "dim", "inner_dim", "d_model", "split_size", "internal_dim",
    "dim_model", "d_model_size", "attention_hidden_size", "q_size", "q_dim", "qk_channels", "v_channels",
    "post_in_features", "dim_out",
)  # fmt: skip
KEY_VALUE_WIDTH = ("kv_dim", "kv_size")
NEURONS = (
    "intermediate_size", "intermediate_dim", "expert_dim", "ffn_hidden_size", "bottleneck_size", "ffn_dim",
    "moe_intermediate_size", "hidden_features",
)  # fmt: skip
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts", "n_experts")
# Experts that a router chooses for each token.
CHOSEN_EXPERTS = ("top_k", "num_experts_per_tok", "moe_top_k", "num_selected_experts", "k")
STREAM = ("hidden_size", "embed_dim", "d_model", "dim", "normalized_shape", "weight_shape")

# Attentions whose heads cannot be cut, by class, and what their code does.
_FROM_STREAM = "computes the size of its heads from the residual stream's"
RIGID_HEADS = {
    **dict.fromkeys(
        ("BlipAttention", "Blip2Attention", "InstructBlipAttention", "InstructBlipVideoAttention", "MgpstrAttention",
         "TimesformerSelfAttention", "PPOCRV5ServerRecAttention", "PPOCRV5MobileRecAttention",
         "PPOCRV6SmallRecAttention", "Florence2VisionWindowAttention", "DetrAttention", "DabDetrAttention",
         "EomtAttention", "EomtDinov3Attention", "GroundingDinoMultiheadAttention", "MMGroundingDinoMultiheadAttention",
         "GroupViTAttention", "HieraMaskUnitAttention", "LEDEncoderSelfAttention", "LongformerSelfAttention",
         "LxmertAttention", "PegasusXGlobalLocalAttention", "PvtV2SelfAttention", "modeling_fsmt.Attention"),
        _FROM_STREAM,
    ),
    "Gemma3nAudioAttention": "adds positions of as many heads as the config says",
    "CodeGenAttention": "lays its heads out in four equal parts",
}  # fmt: skip
RIGID_MULTIHEAD = _FROM_STREAM
# Attentions that read the number of their heads from the config whenever they run.
READ_CONFIG = (
    "ParakeetEncoderAttention", "FunnelRelMultiheadAttention", "GraniteSpeech5EncoderAttention", "MoonshineAttention",
    "MoonshineStreamingAttention", "NemotronAsrStreamingEncoderAttention", "Phi3Attention", "Phi4MultimodalAttention",
)  # fmt: skip
