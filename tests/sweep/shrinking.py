"""Makes tiny configs of transformers' architectures from the default config of each, with its sizes replaced.

An entry is replaced by its name, in every config inside a config, so that one table serves all architectures. Ids of
special tokens that the small vocabulary lacks are moved to its end.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.sweep.names import Architecture
from tests.sweep.special import CONFIGS

VOCABULARY = 128
WIDTH = 64
HEADS = 4
HEAD_SIZE = WIDTH // HEADS
LAYERS = 4
WINDOW = 8
"""A window longer than the prefix of 6, and shorter than prefix and prompt."""
POSITIONS = 128
IMAGE = 8
"""The pixels along an edge of an image."""
PATCH = 4

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim", "word_embed_proj_dim"), WIDTH
    ),
    **dict.fromkeys(("embedding_size", "decoder_hidden_size", "encoder_hidden_size", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("decoder_d_model", "projection_dim", "proj_dim", "text_hidden_size", "lru_width"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim", "dim_ff"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size_mlp", "dff"), 48),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "ffn_intermediate_size"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(
        ("num_decoder_layers", "num_encoder_layers", "depth", "n_encoder_layers", "n_decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "global_head_dim", "swa_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("v_head_dim", "kv_channels", "attention_head_size", "qk_head_dim", "dim_head"), HEAD_SIZE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("attention_chunk_size",), WINDOW),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"), POSITIONS),
    **dict.fromkeys(("max_source_positions", "n_ctx", "max_encoder_position_embeddings"), POSITIONS),
    **dict.fromkeys(("max_decoder_position_embeddings", "max_sequence_length"), POSITIONS),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "low_rank_dim", "index_head_dim"), 8),
    **dict.fromkeys(("image_size", "input_size"), IMAGE),
    **dict.fromkeys(("patch_size",), PATCH),
    **dict.fromkeys(("num_query_tokens", "latent_query_num", "resampler_n_latents"), 4),
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout"), 0.0),
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
}
_LIMITS = {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "num_kv_shared_layers": 0}
_NOT_WORDS = ("image", "video", "audio", "vision", "boi", "eoi")
_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers")
_ENDLESS = ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id")
"""Tokens that would end a row early, which is compared token by token."""


def tiny(model_class: Any, architecture: Architecture) -> Any:
    """Returns a small config for this model class."""
    overrides = dict(CONFIGS.get(architecture.label, CONFIGS.get(architecture.model_type, {})))
    config_class = model_class.config_class or CONFIG_MAPPING[architecture.model_type]
    defaults = config_class().to_dict()
    if architecture.kind == "decoder" and "is_decoder" in defaults:
        overrides.setdefault("is_decoder", True)
    if defaults.get("is_encoder_decoder"):
        overrides.setdefault("decoder_start_token_id", 2)
    return _shrunk(config_class, overrides, _special_ids())


def _special_ids() -> Iterator[int]:
    return iter(range(VOCABULARY - 1, 0, -1))


def _shrunk(kind: Callable[..., Any], overrides: Mapping[str, Any], ids: Iterator[int], nested: bool = False) -> Any:
    default: Any = kind()
    values = default.to_dict()
    here = {name: value for name, value in overrides.items() if "." not in name}
    entries = {name: new for name, old in values.items() if (new := _entry(name, old, values, ids)) is not None}
    for name in getattr(kind, "sub_configs", {}):
        inner = getattr(default, name, None)
        if isinstance(inner, PreTrainedConfig) and name not in here:
            inside = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{name}.")}
            entries[name] = _shrunk(type(inner), inside, ids, nested=True)
    for name in _ENDLESS:
        if name in values or not nested:
            entries[name] = None
    if "pad_token_id" in values or not nested:
        entries["pad_token_id"] = 0
    return kind(**entries | here)


def _entry(name: str, old: Any, values: Mapping[str, Any], ids: Iterator[int]) -> Any:
    """Returns the replacement of one entry, or None to keep the default."""
    if name in ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "swa_num_key_value_heads"):
        return _kv_heads(old, values)
    if name in _SIZES:
        return _SIZES[name] if old is not None else None
    if name in _LIMITS and isinstance(old, int):
        return min(old, _LIMITS[name])
    if name in _LAYER_LISTS and isinstance(old, list) and old:
        return _cycled(old)
    if name == "rope_parameters" and isinstance(old, dict):
        return _with_sections(old)
    if name.endswith(("token_id", "token_index")) and isinstance(old, int) and name not in ("pad_token_id", *_ENDLESS):
        if name.startswith(_NOT_WORDS):
            return next(ids)
        return old if old < 3 else 1
    return None


def _cycled(kinds: list[Any]) -> list[Any]:
    """Returns all kinds of layers in turn."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct[layer % len(distinct)] for layer in range(LAYERS)]


def _with_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Returns rotary sections for several axes of a smaller head."""
    if "mrope_section" not in rope:
        return {kind: _with_sections(own) if isinstance(own, dict) else own for kind, own in rope.items()}
    half = round(HEAD_SIZE // 2 * rope.get("partial_rotary_factor", 1.0))
    return rope | {"mrope_section": [half - 2 * (half // 3 + half % 2), *[half // 3 + half % 2] * 2]}


def _kv_heads(old: Any, values: Mapping[str, Any]) -> int | None:
    heads = next((values[name] for name in ("num_attention_heads", "n_head", "num_heads") if name in values), None)
    if not isinstance(old, int):
        return None
    if old == heads:
        return HEADS
    return 1 if old == 1 else 2
