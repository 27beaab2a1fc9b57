"""What single architectures need in addition to the general sizes of `tests.sweep.shrinking`."""

from collections.abc import Mapping
from typing import Any, Final

Options = Mapping[str, Any]

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)
_MIXED = ["sliding_attention", "full_attention"] * 2
_THREE_AXES = {"text_config.rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}}
_VOCABULARY_MAP = {"vocabulary_map": {"<image>": 120, "IMGIMG": 121}}
_TILES = {"image_grid_pinpoints": [[8, 16], [16, 8]]}
_OMNI = {"vision_start_token_id": 110, "audio_start_token_id": 111}

_SMALL_VISION = {
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "global_head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 64,
}

CONFIGS: Final[Mapping[str, Options]] = {
    "aria": {"projector_patch_to_query_dict": {4: 4}},
    "blip-2": {"image_token_index": 126},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": _VOCABULARY_MAP,
    "codegen": {"rotary_dim": 8},
    "cohere_compass": {"text_config.rope_parameters": _ROPES, "text_config.layer_types": _MIXED},
    "cohere_compass_text": {"rope_parameters": _ROPES, "layer_types": _MIXED},
    "cosmos3_edge": _THREE_AXES,
    "cosmos3_omni": _THREE_AXES,
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48},
    },
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"] * 2,
        "text_config.num_experts_per_tok": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": _VOCABULARY_MAP | {"vq_config.base_channels": 32},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [48, 48]},
    "florence2": {
        "vision_config.patch_size": (7, 3, 3, 3),
        "vision_config.embed_dim": (16, 16, 16, 16),
        "vision_config.num_heads": (2, 2, 2, 2),
        "vision_config.num_groups": (2, 2, 2, 2),
        "vision_config.depths": (1, 1, 1, 1),
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3_text:short": {"sliding_window": 4},
    "gemma2:short": {"sliding_window": 4},
    "gemma4_text:short": {"sliding_window": 4},
    "gemma4": {"vision_config": _SMALL_VISION},
    "glm4v": _THREE_AXES,
    "glm46v": _THREE_AXES,
    "glm4v_moe": {"text_config.rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm_ocr": _THREE_AXES,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "gptj": {"rotary_dim": 8},
    "falcon:alibi": {"alibi": True, "multi_query": False},
    "falcon:alibi-multi-query": {"alibi": True},
    "falcon:new-decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon:many-heads": {"alibi": True, "multi_query": False, "num_attention_heads": 16, "num_kv_heads": 16},
    "granite4_vision": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2"},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl": {"text_config.head_dim": 16},
    "instructblip": {"image_token_index": 126},
    "instructblipvideo": {"video_token_index": 126},
    "janus": {"vq_config.base_channels": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "led": {"attention_window": [8] * 4},
    "llama4": {
        "floor_scale": 4,
        "text_config.floor_scale": 4,
        "vision_config.intermediate_size": 256,
        "vision_config.projector_input_dim": 64,
        "vision_config.projector_output_dim": 64,
        "vision_config.vision_output_dim": 64,
    },
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "mistral3": {"vision_config.image_size": 16},
    "mistral:short": {"sliding_window": 4},
    "mllama": {
        "text_config.cross_attention_layers": [3],
        "vision_config.intermediate_layers_indices": [1],
        "vision_config.vision_output_dim": 128,
    },
    "molmo2": {"vision_config.image_size": [8, 8], "adapter_config.vision_feature_layer": [3, 1]},
    "nemo_speechlm": {"head_config.audio_hidden_size": 64},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": _THREE_AXES,
    "qwen2:windows": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_vl": _THREE_AXES,
    "qwen2_5_vl": _THREE_AXES,
    "qwen2_5_omni_thinker": _THREE_AXES | _OMNI,
    "qwen3_omni_moe_thinker": _THREE_AXES | _OMNI,
    "qwen3_vl": _THREE_AXES,
    "qwen3_vl_moe": _THREE_AXES,
    "qwen3_asr": {"eos_token_id": 127},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 64,
        "text_config.indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "step3p7": {"text_config.sliding_window": 8},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layer": [-1, -2]},
    "xlm": {"emb_dim": 64},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Entries of a config by model type or variant; a dotted name reaches into a config inside."""

VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {
    "falcon": ("alibi", "alibi-multi-query", "many-heads", "new-decoder"),
    "gemma2": ("short",),
    "gemma3_text": ("short",),
    "gemma4_text": ("short",),
    "mistral": ("short",),
    "qwen2": ("windows",),
}
"""Other configs of one architecture, by model type. `short`: a window shorter than the prefix."""

_ONE_HEAD = {"num_attention_heads": 1, "token_dim": 16}
_FOUR_HEADS = {"num_attention_heads": 4, "token_dim": 64}
_FOUR_LAYERS = {"num_layers": 4, **_FOUR_HEADS}

ADAPTERS: Final[Mapping[str, Options]] = {
    "blip-2": _FOUR_LAYERS,
    "dbrx": _ONE_HEAD,
    "encoder-decoder": _FOUR_LAYERS,
    "falcon": _ONE_HEAD,
    "falcon:alibi": {},
    "falcon:many-heads": {},
    "falcon:new-decoder": _FOUR_HEADS,
    "florence2": _FOUR_LAYERS,
    "gpt_bigcode": _ONE_HEAD,
    "instructblip": _FOUR_LAYERS,
    "instructblipvideo": _FOUR_LAYERS,
    "kosmos-2": _FOUR_LAYERS,
    "kosmos-2.5": _FOUR_LAYERS,
    "mpt": _FOUR_HEADS,
    "pp_formulanet": _FOUR_LAYERS,
    "prophetnet": _FOUR_HEADS,
    "t5gemma": {"num_layers": 4, "num_attention_heads": 2, "token_dim": 32},
    "trocr": _FOUR_HEADS,
    "t5gemma2": {"num_layers": 4, "num_attention_heads": 2, "token_dim": 32},
    "vision-encoder-decoder": _FOUR_LAYERS,
    "xglm": _FOUR_HEADS,
    "xlm": _FOUR_LAYERS,
}
"""PEFT's options for models whose dimensions its config infers wrongly, or not at all."""
