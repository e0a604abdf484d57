"""Inputs of a forward, by hand, for model types whose forward needs more than names and sizes tell.

Each function is registered for its model types and gives the arguments for a model, or None to leave it to the guesses.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Any]

HAND_INPUTS: dict[str, Callable[[nn.Module, Any], Inputs | None]] = {}


def floats(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers of a shape, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, low: int = 10, high: int = 200) -> Tensor:
    """Whole numbers of a shape from `low` up to `high`, the same every time."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


def ones(*shape: int) -> Tensor:
    """A mask that hides nothing."""
    return torch.ones(*shape, dtype=torch.long)


def _inputs_of(*types: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        HAND_INPUTS.update(dict.fromkeys(types, function))
        return function

    return register


# Text


@_inputs_of("decision_transformer")
def _decision_transformer(model, config):
    return {
        "states": floats(2, 5, config.state_dim),
        "actions": floats(2, 5, config.act_dim),
        "rewards": floats(2, 5, 1),
        "returns_to_go": floats(2, 5, 1),
        "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5),
    }


@_inputs_of("jev")
def _jev(model, config):
    return {
        "input_ids": integers(2, 12),
        "marks": torch.zeros(2, 12, dtype=torch.long),
        "num_options": torch.tensor([2, 2]),
        "question_type_ids": torch.zeros(2, dtype=torch.long),
    }


@_inputs_of("longformer")
def _longformer(model, config):
    ids = integers(2, 16)
    attends_everywhere = torch.zeros_like(ids)
    attends_everywhere[:, 0] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "global_attention_mask": attends_everywhere,
    }


@_inputs_of("led")
def _led(model, config):
    return {**_longformer(model, config), "decoder_input_ids": integers(2, 7), "use_cache": False}


@_inputs_of("luke", "mluke")
def _luke(model, config):
    if "MaskedLM" not in type(model).__name__ and type(model).__name__ != "LukeModel":
        return None
    return {
        "input_ids": integers(2, 12),
        "entity_ids": integers(2, 3, low=3, high=60),
        "entity_position_ids": torch.tensor([[[1, 2], [3, 4], [5, -1]]] * 2),
    }


@_inputs_of("muse_glimmer_assistant")
def _muse_glimmer_assistant(model, config):
    return {
        "noise_embeds": floats(2, 5, config.hidden_size),
        "context_hidden_states": floats(2, 9, 320),
    }


@_inputs_of("perceiver")
def _perceiver(model, config):
    kind = type(model).__name__
    if kind in ("PerceiverForMaskedLM", "PerceiverForSequenceClassification"):
        return {"inputs": integers(2, 12)}
    if any(word in kind for word in ("Conv", "Fourier", "Learned")):
        return {"inputs": floats(2, 3, 56, 56)}
    return {"inputs": floats(2, 12, config.d_model)}


@_inputs_of("rag")
def _rag(model, config):
    return {
        "input_ids": integers(1, 12),
        "context_input_ids": integers(2, 10),
        "context_attention_mask": ones(2, 10),
        "doc_scores": floats(1, 2),
        "decoder_input_ids": integers(1, 6),
        "n_docs": 2,
    }


@_inputs_of("t5gemma2_decoder")
def _t5gemma2_decoder(model, config):
    return {
        "input_ids": integers(2, 12),
        "encoder_hidden_states": floats(2, 9, config.hidden_size),
        "use_cache": False,
    }


# Time series


@_inputs_of("autoformer", "informer", "time_series_transformer")
def _time_series_transformer(model, config):
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": floats(2, past),
        "past_time_features": floats(2, past, 1),
        "past_observed_mask": torch.ones(2, past),
        "future_values": floats(2, 4, seed=2),
        "future_time_features": floats(2, 4, 1, seed=3),
    }


@_inputs_of("patchtst", "patchtsmixer")
def _patched_time_series(model, config):
    return {"past_values": floats(2, config.context_length, config.num_input_channels)}


@_inputs_of("timesfm", "timesfm2_5")
def _timesfm(model, config):
    if "ForPrediction" in type(model).__name__:
        return {"past_values": [floats(64), floats(64, seed=2)]}
    inputs = {"past_values": floats(2, 64), "past_values_padding": torch.zeros(2, 64, dtype=torch.long)}
    if "freq" in inspect.signature(model.forward).parameters:
        inputs["freq"] = torch.zeros(2, 1, dtype=torch.long)
    return inputs


# Audio


@_inputs_of("audio-spectrogram-transformer")
def _audio_spectrogram_transformer(model, config):
    return {"input_values": floats(2, config.max_length, config.num_mel_bins)}


@_inputs_of("audioflamingo3_encoder", "qwen3_asr_encoder")
def _mel_encoder(model, config):
    frames = 2 * getattr(config, "max_source_positions", 50)
    if type(config).__name__.startswith("Qwen3ASR"):
        frames = 4 * config.n_window
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_size", None) or 80
    return {"input_features": floats(2, bins, frames), "input_features_mask": ones(2, frames)}


@_inputs_of("fun_asr_nano_encoder")
def _fun_asr_nano_encoder(model, config):
    width = getattr(config, "input_size", 560)
    return {"input_features": floats(2, 32, width), "input_features_mask": ones(2, 32)}


@_inputs_of("qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder")
def _qwen_omni_audio_encoder(model, config):
    frames = 2 * config.n_window
    inputs = {
        "input_features": floats(config.num_mel_bins, 2 * frames),
        "feature_lens": torch.tensor([frames, frames]),
    }
    if "2_5" in config.model_type:
        inputs["aftercnn_lens"] = torch.tensor([frames // 2, frames // 2])
    return inputs


@_inputs_of("clap")
def _clap(model, config):
    return {
        "input_ids": integers(2, 12),
        "input_features": floats(2, 1, 1001, config.audio_config.num_mel_bins),
        "is_longer": torch.tensor([[False], [False]]),
    }


@_inputs_of("clvp")
def _clvp(model, config):
    return {
        "input_ids": integers(2, 12, high=100),
        "input_features": floats(2, config.decoder_config.feature_size, 64),
    }


@_inputs_of("dia")
def _dia(model, config):
    return {
        "input_ids": integers(2, 12, high=100),
        "decoder_input_ids": integers(2, 7, 9, low=0, high=100),
    }


@_inputs_of("dia_decoder")
def _dia_decoder(model, config):
    return {
        "input_ids": integers(2, 7, 9, low=0, high=100),
        "encoder_hidden_states": floats(2, 9, config.cross_hidden_size),
    }


@_inputs_of("gemma3n_audio")
def _gemma3n_audio(model, config):
    return {
        "audio_mel": floats(2, 64, config.input_feat_size),
        "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool),
    }


@_inputs_of("granite_speech_encoder", "granite_speech_plus_encoder")
def _granite_speech_encoder(model, config):
    return {"hidden_states": floats(2, 24, config.input_dim)}


@_inputs_of("granite_speech5_encoder", "granite_speech5_ctc")
def _granite_speech5(model, config):
    return {"input_features": floats(2, 24, 320)}


@_inputs_of("higgs_audio_v2_tokenizer", "xcodec")
def _xcodec(model, config):
    return {"input_values": floats(2, 1, 6400)}


@_inputs_of("inkling_audio")
def _inkling_audio(model, config):
    return {"audio_input_ids": integers(2, 4, 12, low=0, high=8)}


@_inputs_of("mimi_decoder", "pocket_tts_audio_tokenizer_decoder")
def _latent_decoder(model, config):
    return {"latents": floats(2, getattr(config, "latent_dim", None) or config.hidden_size, 8)}


@_inputs_of("moshi_depth")
def _moshi_depth(model, config):
    return {
        "input_ids": integers(2, 4, high=100),
        "last_hidden_state": floats(2, 1, config.input_size),
        "use_cache": False,
    }


@_inputs_of("muse_spark_audio")
def _muse_spark_audio(model, config):
    return {"input_values": floats(2, 3840)}


@_inputs_of("musicgen", "musicgen_melody", "musicgen_decoder", "musicgen_melody_decoder")
def _musicgen(model, config):
    decoder = getattr(config, "decoder", config)
    codes = integers(2 * decoder.num_codebooks, 6)
    if "ForConditionalGeneration" in type(model).__name__ and hasattr(config, "text_encoder"):
        return {"input_ids": integers(2, 12), "decoder_input_ids": codes}
    return {"input_ids": codes, "encoder_hidden_states": floats(2, 5, decoder.hidden_size)}


@_inputs_of("neucodec", "xcodec2")
def _xcodec2(model, config):
    semantic = getattr(config, "semantic_model_config", config)
    width = getattr(semantic, "feature_projection_input_dim", 160)
    return {"input_values": floats(1, 1, 3200), "input_features": floats(1, 5, width)}


@_inputs_of("pe_audio")
def _pe_audio(model, config):
    return {"input_ids": integers(2, 12), "input_values": floats(2, 1, 8000)}


@_inputs_of("phi4_multimodal_audio")
def _phi4_multimodal_audio(model, config):
    return {"hidden_states": floats(2, 64, config.input_size), "mask": torch.ones(2, 64, dtype=torch.bool)}


@_inputs_of("qwen2_5_omni_bigvgan")
def _qwen2_5_omni_bigvgan(model, config):
    return {"mel_spectrogram": floats(1, config.mel_dim, 16)}


@_inputs_of("speecht5")
def _speecht5(model, config):
    kind = type(model).__name__
    if kind == "SpeechT5Model":
        return {"input_values": floats(2, 12, 64), "decoder_input_values": floats(2, 7, 64)}
    if "SpeechToText" in kind:
        return {"input_values": floats(2, 4000), "decoder_input_ids": integers(2, 7, high=80)}
    spoken = {
        "decoder_input_values": floats(2, 8, config.num_mel_bins),
        "speaker_embeddings": floats(2, config.speaker_embedding_dim),
    }
    if "TextToSpeech" in kind:
        return {"input_ids": integers(2, 12, high=80), **spoken}
    return {"input_values": floats(2, 4000), **spoken}


@_inputs_of("vibevoice_acoustic_tokenizer")
def _vibevoice_acoustic_tokenizer(model, config):
    return {"input_values": floats(1, 1, 6400)}


@_inputs_of("voxtral_realtime_text")
def _voxtral_realtime_text(model, config):
    return {"input_ids": integers(2, 12), "t_cond": floats(2, 1, config.hidden_size), "use_cache": False}


@_inputs_of("wav2vec2-bert")
def _wav2vec2_bert(model, config):
    return {"input_features": floats(2, 20, config.feature_projection_input_dim)}


# Vision


@_inputs_of(
    "conditional_detr",
    "d_fine",
    "dab-detr",
    "deformable_detr",
    "deimv2",
    "detr",
    "lw_detr",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "rt_detr",
    "rt_detr_v2",
    "table-transformer",
)
def _detr(model, config):
    return {"pixel_values": floats(2, 3, 128, 128)}


@_inputs_of("mask2former", "maskformer")
def _maskformer(model, config):
    return {"pixel_values": floats(1, 3, 128, 128)}


@_inputs_of("rf_detr")
def _rf_detr(model, config):
    size = config.backbone_config.image_size
    return {"pixel_values": floats(1, 3, size, size)}


@_inputs_of("oneformer")
def _oneformer(model, config):
    return {"pixel_values": floats(1, 3, 128, 128), "task_inputs": integers(1, 77)}


@_inputs_of("omdet-turbo")
def _omdet_turbo(model, config):
    return {
        "pixel_values": floats(1, 3, 640, 640),
        "classes_input_ids": integers(2, 8),
        "classes_attention_mask": ones(2, 8),
        "tasks_input_ids": integers(1, 8),
        "tasks_attention_mask": ones(1, 8),
        "classes_structure": torch.tensor([2]),
    }


@_inputs_of("sam3_detr_encoder", "sam3_lite_text_detr_encoder")
def _sam3_detr_encoder(model, config):
    return {
        "vision_features": [floats(2, config.hidden_size, 4, 4)],
        "text_features": floats(2, 5, config.hidden_size),
        "vision_pos_embeds": [floats(2, config.hidden_size, 4, 4, seed=2)],
    }


@_inputs_of("sam3_detr_decoder", "sam3_lite_text_detr_decoder")
def _sam3_detr_decoder(model, config):
    return {
        "vision_features": floats(2, 16, config.hidden_size),
        "text_features": floats(2, 5, config.hidden_size),
        "vision_pos_encoding": floats(2, 16, config.hidden_size, seed=2),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


@_inputs_of("llama4_vision_model")
def _llama4_vision_model(model, config):
    return {"pixel_values": floats(2, 3, config.image_size, config.image_size)}


@_inputs_of("mllama_vision_model")
def _mllama_vision_model(model, config):
    return {
        "pixel_values": floats(1, 1, config.max_num_tiles, 3, config.image_size, config.image_size),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, config.max_num_tiles),
    }


@_inputs_of("siglip2", "siglip2_vision_model")
def _siglip2(model, config):
    patch = getattr(config, "vision_config", config).patch_size
    inputs = {
        "pixel_values": floats(2, 16, patch**2 * 3),
        "pixel_attention_mask": ones(2, 16),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    if type(model).__name__ == "Siglip2Model":
        inputs["input_ids"] = integers(2, 12)
    return inputs


@_inputs_of("minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision")
def _minicpm_vision(model, config):
    return {
        "pixel_values": floats(1, 3, config.patch_size, 32 * config.patch_size),
        "target_sizes": torch.tensor([[4, 4], [4, 4]]),
    }


@_inputs_of("gemma4_vision")
def _gemma4_vision(model, config):
    places = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1)
    return {
        "pixel_values": floats(2, 36, 3 * config.patch_size**2),
        "pixel_position_ids": places.reshape(1, 36, 2).repeat(2, 1, 1),
    }


@_inputs_of("pix2struct", "pix2struct_vision_model")
def _pix2struct(model, config):
    projection = next(module for path, module in model.named_modules() if path.endswith("patch_projection"))
    patches = floats(2, 16, projection.weight.shape[1] + 2)
    patches[..., :2] = torch.arange(1, 17)[None, :, None].float()
    inputs = {"flattened_patches": patches}
    if hasattr(config, "text_config"):
        inputs["decoder_input_ids"] = integers(2, 7)
    return inputs


@_inputs_of("pix2struct_text_model")
def _pix2struct_text_model(model, config):
    return {
        "input_ids": integers(2, 12),
        "encoder_hidden_states": floats(2, 9, config.hidden_size),
        "use_cache": False,
    }


@_inputs_of("molmo2_vision")
def _molmo2_vision(model, config):
    size = config.image_size[0] if isinstance(config.image_size, (list, tuple)) else config.image_size
    return {"pixel_values": floats(2, (size // config.patch_size) ** 2, 3 * config.patch_size**2)}


@_inputs_of("efficientloftr", "lightglue", "superglue")
def _image_pair(model, config):
    return {"pixel_values": floats(1, 2, 3, 128, 128)}


@_inputs_of("seggpt")
def _seggpt(model, config):
    height, width = config.image_size
    return {
        "pixel_values": floats(1, 3, height // 2, width),
        "prompt_pixel_values": floats(1, 3, height // 2, width, seed=2),
        "prompt_masks": floats(1, 3, height // 2, width, seed=3),
    }


@_inputs_of("xclip_vision_model")
def _xclip_vision_model(model, config):
    return {"pixel_values": floats(8, 3, config.image_size, config.image_size)}


@_inputs_of("video_llama_3_vision")
def _video_llama_3_vision(model, config):
    return {
        "pixel_values": floats(32, 3 * config.patch_size**2),
        "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "merge_sizes": torch.tensor([2, 2]),
    }


@_inputs_of("kosmos_2_5_vision_model")
def _kosmos_2_5_vision_model(model, config):
    return {"hidden_states": floats(2, 9, config.hidden_size), "attention_mask": torch.ones(2, 9)}


@_inputs_of("florence_vision", "pp_ocrv5_mobile_det")
def _image_as_hidden_states(model, config):
    return {"hidden_states": floats(2, 3, 64, 64)}


@_inputs_of("janus_vqgan")
def _janus_vqgan(model, config):
    return {"pixel_values": floats(1, 3, 512, 512)}


@_inputs_of("chameleon_vqgan", "emu3_vqgan", "glm_image_vqmodel")
def _vqgan(model, config):
    return {"pixel_values": floats(1, 3, 64, 64)}


@_inputs_of("slanext")
def _slanext(model, config):
    return {"hidden_states": floats(1, 3, 512, 512)}


@_inputs_of("slanet")
def _slanet(model, config):
    return {"hidden_states": floats(2, 12, 96)}


@_inputs_of("unlimited_ocr_vision_encoder")
def _unlimited_ocr_vision_encoder(model, config):
    return {"patch_embeds": floats(2, config.hidden_size, 4, 4)}


@_inputs_of("deepseek_ocr2_encoder")
def _deepseek_ocr2_encoder(model, config):
    return {"inputs_embeds": floats(2, 32, config.hidden_size), "num_patches": 16}


# Vision and text


@_inputs_of("blip-2", "instructblip", "instructblipvideo")
def _blip_2(model, config):
    is_video = "video" in config.model_type
    size = config.vision_config.image_size
    token = getattr(config, "image_token_index", None) or getattr(config, "image_token_id", None)
    if is_video:
        token = getattr(config, "video_token_index", None) or token
    ids = integers(2, 8)
    if token is not None:
        count = config.num_query_tokens * (2 if is_video else 1)
        ids = torch.cat([ids[:, :2], torch.full((2, count), token), ids[:, 2:]], 1)
    inputs = {
        "pixel_values": floats(2, 2, 3, size, size) if is_video else floats(2, 3, size, size),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    if config.model_type != "blip-2":
        inputs["qformer_input_ids"] = integers(2, 6)
    if getattr(config.text_config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = integers(2, 5)
    return inputs


@_inputs_of("blip_2_qformer")
def _blip_2_qformer(model, config):
    return {
        "query_embeds": floats(2, 4, config.hidden_size),
        "encoder_hidden_states": floats(2, 9, config.encoder_hidden_size),
    }


@_inputs_of("instructblip_qformer", "instructblipvideo_qformer")
def _instructblip_qformer(model, config):
    return {"input_ids": integers(2, 6), **_blip_2_qformer(model, config)}


@_inputs_of("flava")
def _flava(model, config):
    size = config.image_config.image_size
    return {"input_ids": integers(2, 12), "pixel_values": floats(2, 3, size, size)}


@_inputs_of("idefics")
def _idefics(model, config):
    size = config.vision_config.image_size
    return {
        "input_ids": integers(2, 12),
        "attention_mask": ones(2, 12),
        "pixel_values": floats(2, 1, 3, size, size),
        "image_attention_mask": ones(2, 12, 1),
    }


@_inputs_of("idefics2_perceiver")
def _idefics2_perceiver(model, config):
    return {"context": floats(2, 9, config.hidden_size), "attention_mask": ones(2, 9)}


@_inputs_of("kosmos-2")
def _kosmos_2(model, config):
    count, size = config.latent_query_num, config.vision_config.image_size
    is_image = torch.zeros(2, count + 4, dtype=torch.long)
    is_image[:, 2 : 2 + count] = 1
    return {
        "pixel_values": floats(2, 3, size, size),
        "input_ids": integers(2, count + 4),
        "image_embeds_position_mask": is_image,
    }


@_inputs_of("layoutlmv2")
def _layoutlmv2(model, config):
    return {
        "input_ids": integers(2, 12),
        "bbox": torch.zeros(2, 12, 4, dtype=torch.long),
        "image": floats(2, 3, 224, 224),
    }


@_inputs_of("lxmert")
def _lxmert(model, config):
    return {
        "input_ids": integers(2, 12),
        "visual_feats": floats(2, 5, config.visual_feat_dim),
        "visual_pos": floats(2, 5, config.visual_pos_dim),
    }


@_inputs_of("tvp")
def _tvp(model, config):
    return {"input_ids": integers(2, 12), "pixel_values": floats(2, config.num_frames, 3, 448, 448)}


@_inputs_of("vilt")
def _vilt(model, config):
    size = config.image_size
    return {
        "input_ids": integers(2, 12),
        "pixel_values": floats(2, 3, size, size),
        "pixel_mask": ones(2, size, size),
    }
