"""Config values, by hand, where shrinking by rule does not give a model that builds or covers its branches.

`CONFIGS` maps a model type to arguments of its config, those of nested configs in nested dicts. `VARIANTS` adds types
with a `+` in their name: branches of a config that its defaults do not take but popular checkpoints do.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

DROP = object()
"""As a value: leave the argument out, whatever the rules say."""


def overrides(model_type: str) -> dict[str, Any]:
    """The arguments that a type's config, or its variant's, is given whatever the rules say."""
    base = CONFIGS.get(model_type.split("+")[0], {})
    # Nested models are built when they are asked for: building one imports its package.
    values = {name: value() if callable(value) else value for name, value in base.items()}
    for name, value in VARIANTS.get(model_type, {}).items():
        nested = isinstance(value, dict) and isinstance(values.get(name), dict)
        values[name] = {**values[name], **value} if nested else value
    return values


def _resnet(stages: list[str]) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=stages,
    )


def _dinov2() -> Any:
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )


def _rope(*mrope_section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope_section)}


_FOUR_STAGES = partial(_resnet, ["stage1", "stage2", "stage3", "stage4"])
_THREE_STAGES = partial(_resnet, ["stage2", "stage3", "stage4"])
_DETR = {"backbone_config": _FOUR_STAGES, "use_timm_backbone": False, "num_queries": 7}
_RT_DETR = {"num_queries": 7, "num_denoising": 0}
_DEPTH_ANYTHING = {"backbone_config": _dinov2, "reassemble_hidden_size": 32, "patch_size": 14}
_TIME_SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "d_model": 64,
}
_DEEPSEEK_OCR2_TEXT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}
_DIFFUSION_GEMMA_TEXT = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
_COHERE_COMPASS_TEXT = {
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_parameters": {"full_attention": _rope(2, 3, 3), "sliding_attention": _rope(2, 3, 3)},
}
_ERNIE_TEXT = {"rope_parameters": _rope(3, 3, 2)}
_QWEN4_EXP_TEXT = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 512,
}
_NEMOTRON_H = {
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "moe", "attention", "mlp"],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_groups": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "moe_latent_size": None,
}
_ZAMBA = {
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
    "layers_block_type": DROP,
}

# Without these, only models with images of 1024 pixels and full widths run, for seconds.
_SAM_VISION = {"output_channels": 64, "num_pos_feats": 32}
_SAM2_VISION = {
    "backbone_config": {
        "hidden_size": 16,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 2, 4, 2],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [128, 64, 32, 16],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    "fpn_hidden_size": 64,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    # Text
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass": {"text_config": _COHERE_COMPASS_TEXT},
    "cohere_compass_text": _COHERE_COMPASS_TEXT,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2": {"text_config": _DEEPSEEK_OCR2_TEXT},
    "deepseek_ocr2_text": _DEEPSEEK_OCR2_TEXT,
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 4},
    "diffusion_gemma": {"text_config": _DIFFUSION_GEMMA_TEXT},
    "diffusion_gemma_text": _DIFFUSION_GEMMA_TEXT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "ernie4_5_vl_moe": {"text_config": _ERNIE_TEXT},
    "ernie4_5_vl_moe_text": _ERNIE_TEXT,
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "hidden_size": 64, "expand": 2, "n_groups": 2},
    "nemo_speechlm": {"text_config": _NEMOTRON_H},
    "nemotron_h": _NEMOTRON_H,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 48},
    "qwen4_exp": {"text_config": _QWEN4_EXP_TEXT},
    "qwen4_exp_text": _QWEN4_EXP_TEXT,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "step3p5": {"sliding_window": 8},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse"]},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX", "de_DE"]},
    "zamba": {**_ZAMBA, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        **_ZAMBA,
        "hybrid_layer_ids": [1, 3],
        "num_mem_blocks": 1,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "use_shared_attention_adapter": False,
        "use_mem_rope": True,
    },
    # Time series
    "autoformer": {**_TIME_SERIES, "label_length": 4, "moving_average": 3},
    "informer": _TIME_SERIES,
    "time_series_transformer": _TIME_SERIES,
    # Audio
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "clap": {
        "audio_config": {
            "patch_embeds_hidden_size": 32,
            "hidden_size": 256,
            "num_attention_heads": [2, 4, 8, 16],
            "depths": [1, 1, 1, 1],
        }
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moshi_depth": {"input_size": 64},
    "seamless_m4t": {"unit_hifi_gan_vocab_size": 64, "t2u_vocab_size": 128, "max_source_positions": 64},
    "speech_to_text": {"max_source_positions": 64},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "wav2vec2-bert": {"max_source_positions": 64, "feature_projection_input_dim": 32},
    # Vision, alone and with text
    "align": {"vision_config": {"image_size": 64}},
    "blip-2": {"image_token_index": 500, "num_query_tokens": 4},
    "chameleon": {
        "vocabulary_map": {"<image>": 100},
        "vq_config": {
            "base_channels": 32,
            "embed_dim": 32,
            "latent_channels": 32,
            "resolution": 64,
            "channel_multiplier": [1, 2],
        },
    },
    "conditional_detr": _DETR,
    "cvt": {"depth": [1, 2, 3], "num_heads": [1, 2, 4], "embed_dim": [16, 32, 64]},
    "d_fine": _RT_DETR,
    "dab-detr": _DETR,
    "deformable_detr": {**_DETR, "backbone_config": _THREE_STAGES},
    "deimv2": _RT_DETR,
    "depth_anything": _DEPTH_ANYTHING,
    "detr": _DETR,
    "dots3_note_vision_encoder": {"per_layer_config": None},
    "efficientnet": {"image_size": 64},
    "edgetam_video": {"vision_config": _SAM2_VISION},
    "emu3": {
        "vocabulary_map": {"<image>": 100},
        "vq_config": {"base_channels": 32, "embed_dim": 32, "channel_multiplier": [1, 2], "attn_resolutions": [1]},
    },
    "emu3_vqgan": {"base_channels": 32, "embed_dim": 32, "channel_multiplier": [1, 2], "attn_resolutions": [1]},
    "grounding-dino": {"num_queries": 5},
    "instructblip": {"image_token_index": 500, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 500, "num_query_tokens": 4},
    "llama4_vision_model": {
        "image_size": 56,
        "patch_size": 14,
        "intermediate_size": 256,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
        "pixel_shuffle_ratio": 0.5,
    },
    "lw_detr": {"num_queries": 7, "group_detr": 1},
    "mllama_vision_model": {
        "image_size": 56,
        "intermediate_layers_indices": [0, 1],
        "num_hidden_layers": 2,
        "num_global_layers": 2,
        "vision_output_dim": 192,
    },
    "mm-grounding-dino": {"num_queries": 5},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "molmo2_adapter": {"intermediate_size": 96},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "pp_doclayout_v3": _RT_DETR,
    "pp_doclayout_v4": _RT_DETR,
    "prompt_depth_anything": _DEPTH_ANYTHING,
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "sam": {"vision_config": _SAM_VISION},
    "sam2": {"vision_config": _SAM2_VISION},
    "sam2_hiera_det_model": _SAM2_VISION["backbone_config"],
    "sam2_video": {"vision_config": _SAM2_VISION},
    "sam2_vision_model": _SAM2_VISION,
    "sam_hq": {"vision_config": _SAM_VISION, "mask_decoder_config": {"vit_dim": 64}},
    "seggpt": {
        "image_size": [128, 64],
        "patch_size": 16,
        "pretrain_image_size": 64,
        "num_hidden_layers": 4,
        "merge_index": 1,
        "intermediate_hidden_state_indices": [2, 3],
    },
    "siglip2_vision_model": {"num_patches": 16},
    "swin2sr": {"num_heads": [2, 4, 4, 4, 4, 4]},
    "table-transformer": _DETR,
    "tvp": {"num_frames": 2, "max_img_size": 64},
    "unlimited_ocr_vision": {
        "sam_config": {"output_channels": 64, "downsample_channels": [64, 64], "image_size": 256},
        "encoder_config": {"image_size": 64, "patch_size": 16},
    },
    "upernet": {"backbone_config": _FOUR_STAGES, "use_auxiliary_head": False},
}

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "albert+groups": {"num_hidden_groups": 2},
    "beit+relpos": {"use_relative_position_bias": True},
    "beit+sharedrelpos": {"use_shared_relative_position_bias": True},
    "bert+decoder": {"is_decoder": True, "add_cross_attention": True},
    "cohere+qknorm": {"use_qk_norm": True},
    "data2vec-vision+relpos": {"use_relative_position_bias": True},
    "deberta+full": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "talking_head": True},
    "deberta-v2+full": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "deberta-v2+noshare": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "share_att_key": False,
    },
    "deepseek_v2+noq": {"q_lora_rank": None},
    "deepseek_v3+noq": {"q_lora_rank": None},
    "dinov2+swiglu": {"use_swiglu_ffn": True},
    "dinov3_vit+gated": {"use_gated_mlp": True},
    "esm+relkey": {"position_embedding_type": "relative_key"},
    "esm+rotary": {"position_embedding_type": "rotary", "emb_layer_norm_before": False},
    "falcon+alibi": {"alibi": True, "multi_query": False},
    "falcon+mha": {"multi_query": False},
    "falcon+new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma2+softcap": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gpt2+cross": {"add_cross_attention": True},
    "gpt_bigcode+mha": {"multi_query": False},
    "gpt_neox+fullrotary": {"rotary_pct": 1.0},
    "hubert+conv": {"conv_pos_batch_norm": True},
    "laguna+headgate": {"gating": "per-head"},
    "llama+bias": {"attention_bias": True, "mlp_bias": True},
    "llama+hd": {"head_dim": 24},
    "mixtral+kv1": {"num_key_value_heads": 1},
    "modernbert+bias": {"attention_bias": True, "mlp_bias": True, "norm_bias": True},
    "mpt+noalibi": {"attn_config": {"alibi": False}},
    "mpt+qkln": {"attn_config": {"qk_ln": True}},
    "olmo2+mha": {"num_key_value_heads": 4},
    "parakeet_encoder+nobias": {"attention_bias": False},
    "persimmon+noqknorm": {"qk_layernorm": False},
    "phi+qknorm": {"qk_layernorm": True},
    "qwen2_moe+dense": {"decoder_sparse_step": 2},
    "roberta-prelayernorm+decoder": {"is_decoder": True},
    "siglip_vision_model+nohead": {"vision_use_head": False},
    "stablelm+qknorm": {"qk_layernorm": True},
    "step3p5+headgate": {"sliding_window": 8, "gating": "per-head"},
    "swin+abs": {"use_absolute_embeddings": True},
    "switch_transformers+gated": {"feed_forward_proj": "gated-gelu"},
    "t5+gated": {"feed_forward_proj": "gated-gelu"},
    "umt5+gated": {"feed_forward_proj": "gated-gelu"},
    "vit+nobias": {"qkv_bias": False},
    "wav2vec2+stable": {"do_stable_layer_norm": True, "feat_extract_norm": "layer"},
    "wav2vec2-bert+relative": {"position_embeddings_type": "relative"},
    "wav2vec2-conformer+relative": {"position_embeddings_type": "relative"},
    "wav2vec2-conformer+rotary": {"position_embeddings_type": "rotary"},
    "xlnet+bi": {"bi_data": False},
}
