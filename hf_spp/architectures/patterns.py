"""The written map: which structures hold channels that may move together, as names and layouts.

Data only. The resolver matches it against a model; adding a family is adding a name here, or nothing.

Layouts are einops patterns over the sizes of attention: `k` key-value heads, `r` query heads that share one of them,
`d` rows of a query or key head, `e` rows of a value head; every other letter is an axis that stays.
"""

# Linear layers that are what they seem although their class is one of their own, and wrappers around one linear layer
# that treat its features alike.
PLAIN_LINEAR_CLASSES = ("FalconLinear", "NonDynamicallyQuantizableLinear")
LINEAR_WRAPPERS = ("Gemma4ClippableLinear", "MoshiLinear", "KyutaiSpeechToTextLinear")

# Attention: projections of q, k and v, and the one out of all heads, as children of one module.
SEPARATE_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("linear_q", "linear_k", "linear_v"),
    ("query_proj", "key_proj", "value_proj"),
    ("project_q", "project_k", "project_v"),
    ("to_q", "to_k", "to_v"),
    ("Wq", "Wk", "Wv"),
    ("wq", "wk", "wv"),
    ("q_head", "k_head", "v_head"),
    ("projection_query", "projection_key", "projection_value"),
)
# One projection that stacks q, k and v: whole blocks, or the three side by side for each key-value head.
FUSED_BLOCKS = ("qkv", "Wqkv", "qkv_proj", "c_attn")
FUSED_HEADS = ("query_key_value",)
# One that many kinds of modules have; it is attention where this parameter stands beside it.
FUSED_WITH = {"in_proj": "q_bias"}
# Parameters `[stream, heads, head size]` in place of linear layers.
PARAMETER_PROJECTIONS = {"q": "i (k r) d", "k": "i k d", "v": "i k e", "o": "o (k r) e"}
# A projection of q beside one that stacks k and v.
QUERY_AND_FUSED = (("to_q", "to_kv"), ("q_proj", "kv_proj"), ("q", "kv"))
# Latent attention: keys and values are expanded from one small vector.
LATENT_QUERIES = ("q_b_proj", "q_proj")
LATENT_KEYS_VALUES = "kv_b_proj"
# Deformable attention: values are sampled where the query says; offsets and weights are per head.
DEFORMABLE = ("value_proj", "sampling_offsets", "attention_weights", "output_proj")
OUTPUT_PROJECTIONS = (
    "o_proj", "out_proj", "output_proj", "proj", "o", "out_lin", "linear_out", "to_out", "Wo", "wo", "dense",
    "attention_out", "output", "projection_layer", "projection", "c_proj", "post", "post_proj", "output.dense",
)  # fmt: skip
HEAD_DIM_ATTRIBUTES = (
    "head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "d_head", "dim_head", "d_k", "dim_per_head",
)  # fmt: skip
HEAD_COUNT_ATTRIBUTES = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_head", "attention_heads",
)  # fmt: skip

# Parameters of an attention module beside its projections, by the layouts that they may have.
# For a linear layer that is the layout of its output features.
ATTENTION_SIDES = (
    (("q_norm", "query_norm", "q_layernorm", "query_layernorm", "q_ln", "norm_q", "layernorm_q"),
     ("d", "(k r d)", "(k r) d", "1 d")),
    (("k_norm", "key_norm", "k_layernorm", "key_layernorm", "k_ln", "norm_k", "layernorm_k"),
     ("d", "(k d)", "k d", "1 d")),
    (("v_norm",), ("e", "(k e)", "k e")),
    (("inner_attn_ln", "attn_sub_norm", "sub_norm"), ("(k r e)",)),
    (("gate_proj", "g_proj", "gate_bias"), ("(k r e)", "(k r)")),
    (("sinks", "logit_scale", "attention_sinks", "sink"), ("(k r)", "(k r) 1 1", "1 (k r) 1 1", "1 (k r) 1")),
    (("bias_u", "bias_v", "pos_bias_u", "pos_bias_v", "r_w_bias", "r_r_bias", "r_s_bias"), ("(k r) d", "(k r d)")),
    (("linear_pos", "relative_k_proj", "pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj",
      "relative_position_embedding.pos_proj"), ("(k r d)",)),
    (("r", "r_kernel", "seg_embed"), ("n (k r) d",)),
    (("relative_attention_bias.weight", "relative_position_bias_table",
      "relative_position_bias.relative_position_bias_table"), ("n (k r)",)),
    (("rel_attn_embed.weight",), ("n (k r)",)),
    (("gru_rel_pos_const",), ("1 (k r) 1 1",)),
    (("conv.weight",), ("(k r) 1 x y",)),
    (("attention_biases",), ("(k r) n",)),
    (("continuous_position_bias_mlp.2.weight",), ("(k r) i",)),
    (("rel_pos_h", "rel_pos_w", "distance_embedding.weight", "rel_pos_emb.weight"), ("n d",)),
    (("per_dim_scale", "scaling"), ("d",)),
    (("bias_k", "bias_v"), ("1 1 (k d)",)),
    (("q_bias",), ("(k r d)",)),
    (("v_bias",), ("(k e)",)),
    (("query_global", "w2e_query", "e2w_query", "e2e_query"), ("(k r d)",)),
    (("key_global",), ("(k d)",)),
    (("value_global",), ("(k e)",)),
)  # fmt: skip
# Those of them that read the residual stream, and no positions.
STREAM_READING_SIDES = (
    "gate_proj", "g_proj", "query_global", "key_global", "value_global", "w2e_query", "e2w_query", "e2e_query",
    "pos_key_proj", "pos_query_proj", "pos_proj", "pos_q_proj",
)  # fmt: skip
# What stands in an attention module and sees the residual stream or positions, never a head.
ATTENTION_BESIDE = (
    "LayerNorm", "layer_norm", "layernorm", "ln", "pre_norm", "norm", "sr", "sequence_reduction", "spatial_reduction",
    "indexer", "q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "continuous_position_bias_mlp.0",
    "layernorm1", "layernorm2", "k_rope_only_layernorm",
    "norm_media", "norm_latents", "layer_norm_kv", "dense_bias", "convolution_projection_query",
    "convolution_projection_key", "convolution_projection_value", "gru_rel_pos_linear",
)  # fmt: skip
# Tables outside the attention modules that add a bias per head to every layer below the same module.
SHARED_HEAD_TABLES = {
    "relative_attention_bias.weight": "n (k r)",
    "relative_position_bias.relative_position_bias_table": "n (k r)",
    "rel_pos_bias.weight": "(k r) n",
    "rel_pos_x_bias.weight": "(k r) n",
    "rel_pos_y_bias.weight": "(k r) n",
    "box_rpb_embed_x.layer2.weight": "(k r) n",
    "box_rpb_embed_x.layer2.bias": "(k r)",
    "box_rpb_embed_y.layer2.weight": "(k r) n",
    "box_rpb_embed_y.layer2.bias": "(k r)",
}
# Names of parameters outside of every attention that may add a bias per head.
HEAD_TABLE_NAMES = r"(?i)bias_(values|table)|rel(ative)?_?(pos|att|bias)|rpb|(pos(ition)?|attention)_bias|alibi|slope"
# Arguments of a forward that carry a bias per head from elsewhere.
PER_HEAD_ARGUMENTS = ("alibi", "position_bias", "rel_pos", "rel_2d_pos", "attention_bias", "relative_position_bias")
# Those that may be compared with rows of the queries first.
PER_ROW_ARGUMENTS = ("position_bias",)
# Those that carry learned tables, and nothing where the model has none.
TABLE_ARGUMENTS = ("rel_pos", "rel_2d_pos", "relative_position_bias")
# Names in the code of a forward that rotate q and k.
ROTARY_NAMES = r"rotary|rope|rotate|^cos$|^sin$|freqs|sinusoidal"

# Feed-forward: the projections into the intermediate neurons, and the one out of them.
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("linear_1",), "linear_2"),
    (("linear_fc1",), "linear_fc2"),
    (("wi",), "wo"),
    (("Wi",), "Wo"),
    (("w_in",), "w_out"),
    (("weights_in",), "weights_out"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("proj_in",), "proj_out"),
    (("input_linear",), "output_linear"),
    (("linear_in",), "linear_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate_dense",), "output_dense"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate",), "output"),
    (("ffn",), "ffn_output"),
    (("dense1",), "dense2"),
    (("ffw_layer_1",), "ffw_layer_2"),
    (("pwconv1",), "pwconv2"),
    (("w_in.w_0", "w_in.w_1"), "w_out"),
    (("gate_proj",), "down_proj"),
    (("intermediate_query.dense",), "output_query.dense"),
    (("fc1.proj",), "fc2"),
    (("layer_1",), "layer_2"),
    (("0",), "2"),
    (("0",), "3"),
)  # fmt: skip
FEED_FORWARD_NAMES = r"MLP|Mlp|FeedForward|FFN|Ffn"
# What may stand between the two and treats every neuron alike, or holds one entry per neuron.
NEURON_LAYOUTS = ("m", "m 1 i", "m 1 i j", "1 1 1 m")
FEED_FORWARD_SIDES = ("dwconv", "depthwise_conv", "dwconv.dwconv", "ffn_layernorm", "ffn_sub_norm", "grn")

ROTARY_REASON = "rotary position embedding: each frequency belongs to a fixed row of q and k"
DEFORMABLE_REASON = "deformable attention compares no queries with keys"
KEYS_AS_VALUES_REASON = "the keys serve as values"
NO_OUTPUT_REASON = "no output projection reads the heads"
PER_HEAD_REASON = "a bias of the attention scores comes from elsewhere: argument {argument}"
HEAD_TABLE_REASON = "parameter {name} outside of it may hold a bias per head"
HEAD_BUFFER_REASON = "buffer {name} may hold a value per head"
UNKNOWN_REASON = "no pattern explains {children}"
MIXER_REASON = "a state-space or linear-attention mixer, of which no pattern is written"
ROTARY_VALUE_REASON = "rotary position embedding turns the values as well"
SHARED_KEYS_REASON = "keys and values are shared with other layers"
CROSS_ATTENTION_REASON = "cross-attention reads the states of another model, which keep their order"
LATENT_REASON = "the rotary rows of q and k stay, only those that no position rotates move"
BETWEEN_REASON = "parameter {name} has the heads between other dimensions"
SHARED_REASON = "a parameter is shared with another unit whose other parameters are its own"
COMPOSITE_REASON = (
    "the model is made of several, whose residual streams are not told apart; reorder the parts one by one"
)
FIXED_TENSOR_REASON = "{name} adds computed values to the stream, which are no parameter and cannot move"
HEADLESS_REASON = (
    "the model has no head, its output is the residual stream itself and would change order; load it with a task head"
)

LATENT_READERS = ("q_a_proj", "q_proj", "kv_a_proj_with_mqa")
LATENT_SIZE_ATTRIBUTES = ("qk_nope_head_dim", "v_head_dim")
ROTARY_VALUE_ATTRIBUTE = "rotary_value"
SHARED_KEYS_ATTRIBUTES = ("is_kv_shared_layer", "store_full_length_kv")
# Fused projections of another layout than their name says, by the class that holds them: four times q, v and k.
FUSED_LAYOUTS = {
    "CodeGenAttention": "quarters",
    "GPTBigCodeAttention": "heads",
}
# Arguments of a model that bring hidden states of another one.
OUTSIDE_STATES = ("encoder_hidden_states", "encoder_outputs", "cross_attention_states")
# Cross-attention by the name of its module, and position embeddings by the name of their class.
CROSS_ATTENTION_NAMES = r"(?i)cross|encoder_attn|encoder_decoder|encdec"
FIXED_POSITION_NAMES = r"Sinus|Position(?!.*Rotary)"
# The same for settings of a config, where classes change with the length of the input.
CONFIG_EXCEPTIONS = {("attention_type", "block_sparse"): {"heads": "each head attends to random blocks of its own"}}
# Parameters that mark a mixer of tokens other than attention.
MIXER_PARAMETERS = ("A_log", "time_decay", "dt_bias", "igate_preact")
# What the code of a module does that its structure does not show.
ATTENTION_EXCEPTIONS = {
    "AutoformerAttention": {"heads": "it averages over heads"},
    "Kosmos2ImageToTextProjection": {"heads": "its attention weights are an output of the model"},
    "EfficientLoFTRAttention": {"heads": "rotary frequencies run over all heads"},
    "ClvpSelfAttention": {"vo": "rotary position embedding turns the values as well"},
    "WavLMAttention": dict.fromkeys(("heads", "hidden"), "a gate per head reads the stream's channels at its place"),
    "DiffLlamaAttention": dict.fromkeys(("heads", "vo"), "the two halves of the heads are paired"),
}

# Experts: matrices stacked in a first dimension.
EXPERT_COUNT_ATTRIBUTES = ("moe_num_experts", "num_experts")
EXPERTS = (
    (("gate_up_proj",), "down_proj"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "v1"), "w2"),
    (("input_linear.weight",), "output_linear.weight"),
)
ROUTERS = ("gate", "router")
ROUTER_GROUPS = ("n_group", "num_group", "num_expert_group")
NO_ROUTER_REASON = "no router with one row for each expert stands beside the experts"
ROUTER_TABLE_REASON = "the router looks experts up in a table: {name}"
# Norms beside a feed-forward that are of the residual stream even where that is as wide as the neurons are many.
STREAM_NORMS = (
    "output.LayerNorm", "pre_norm", "final_layer_norm", "self_attn_layer_norm", "encoder_attn_layer_norm",
    "cross_attn_layer_norm", "full_layer_layer_norm", "layer_norm1", "layer_norm2", "layernorm_before",
    "layernorm_after", "pre_layer_norm", "post_layer_norm", "input_layernorm", "post_attention_layernorm",
    "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip
ELEMENTWISE = (
    "Identity",
    "ReLU",
    "GELU",
    "SiLU",
    "Tanh",
    "Sigmoid",
    "Dropout",
    "GELUActivation",
    "QuickGELU",
    "LeakyReLU",
)

# Linear layers of a head whose outputs are the model's, so no stream even where they are as many as its channels.
OUTPUT_LAYERS = (
    "classifier", "cls_classifier", "distillation_classifier", "score", "qa_outputs", "out_proj", "decoder", "lm_head",
    "vocab_projector", "embed_out", "summary", "proj_out", "output_projection", "cls", "seq_relationship",
    "lm_predictions", "logits_proj", "head", "fc", "start_logits", "end_logits", "classification_head",
)  # fmt: skip
# Linear layers outside the layers whose outputs are channels of the stream, where a later layer reads them.
INTERNAL_LAYERS = (
    "dense", "pre_classifier", "vocab_transform", "embedding_hidden_mapping_in", "project_in", "embeddings_project",
    "pooler",
)  # fmt: skip
# Linear layers that read several copies of the residual stream side by side, by model type.
CONCATENATED_READERS = {"dinov2": ("classifier",), "dinov2_with_registers": ("classifier",)}
