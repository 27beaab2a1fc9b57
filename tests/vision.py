"""Tiny models that take images, and inputs for them: two rows, the second padded on the left."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.architectures import VOCABULARY, Architecture

_IMAGE, _START, _END, _VIDEO = 60, 61, 62, 63  # token ids; the inputs' own words are below 50
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32}
_CLIP = _VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_PATCHES = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_PATCHES3 = _PATCHES | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "in_channels": 3}
_QWEN = {
    "text_config": _TEXT | _MROPE,
    "image_token_id": _IMAGE,
    "video_token_id": _VIDEO,
    "vision_start_token_id": _START,
    "vision_end_token_id": _END,
}
_GLM = {
    "image_start_token_id": _START,
    "image_end_token_id": _END,
    "video_start_token_id": 58,
    "video_end_token_id": 59,
}
_IMAGE_INDEX = {"image_token_index": _IMAGE, "image_token_id": _IMAGE}


def _ids(width: int, image_tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (2, width), generator=torch.Generator().manual_seed(5))
    ids[:, 2], ids[:, 3 : 3 + image_tokens], ids[:, 3 + image_tokens] = _START, _IMAGE, _END
    mask = torch.ones_like(ids)
    ids[1, :2] = mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _patches() -> dict[str, Tensor]:
    """Returns images as Qwen's processors give them: 4 x 4 patches each, of which four make a token."""
    ids = _ids(12, 4)
    pixels = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(6))
    types = (ids["input_ids"] == _IMAGE).int()
    return {**ids, "mm_token_type_ids": types, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}


def _untyped_patches() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _patches().items() if name != "mm_token_type_ids"}


def _pixels(*shape: int, tokens: int = 4, types: bool = False) -> Callable[[], dict[str, Tensor]]:
    def inputs() -> dict[str, Tensor]:
        ids = _ids(8 + tokens, tokens)
        own = {"token_type_ids": (ids["input_ids"] == _IMAGE).long()} if types else {}
        return {**ids, **own, "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(6))}

    return inputs


def _of(name: str, model: str, inputs: Callable[[], dict[str, Tensor]], **config: Any) -> Any:
    return Architecture(name, model, config), inputs


_ALL = [
    _of(
        "qwen2-vl",
        "Qwen2VL:Qwen2VLForConditionalGeneration",
        _patches,
        vision_config=_PATCHES | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **_QWEN,
    ),
    _of(
        "qwen2.5-vl",
        "Qwen2_5_VL:Qwen2_5_VLForConditionalGeneration",
        _patches,
        vision_config=_PATCHES3 | {"window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN,
    ),
    _of(
        "qwen3-vl",
        "Qwen3VL:Qwen3VLForConditionalGeneration",
        _patches,
        vision_config=_PATCHES3 | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN,
    ),
    _of(
        "glm4v",
        "Glm4v:Glm4vForConditionalGeneration",
        _patches,
        vision_config=_PATCHES3 | {"image_size": 16},
        **_QWEN,
        **_GLM,
    ),
    _of(
        "hyperclovax",
        "HyperCLOVAXVisionV2:HyperCLOVAXVisionV2ForConditionalGeneration",
        _untyped_patches,
        text_config=_TEXT | {"model_type": "hyperclovax"},
        vision_config=_PATCHES3 | {"window_size": 16, "fullatt_block_indexes": [1], "model_type": "qwen2_5_vl_vision"},
        image_token_id=_IMAGE,
        video_token_id=_VIDEO,
    ),
    _of(
        "llava",
        "Llava:LlavaForConditionalGeneration",
        _pixels(2, 3, 8, 8),
        text_config=_TEXT | {"model_type": "llama"},
        vision_config=_CLIP,
        vision_feature_layer=-1,
        **_IMAGE_INDEX,
    ),
    _of(
        "paligemma",
        "PaliGemma:PaliGemmaForConditionalGeneration",
        _pixels(2, 3, 8, 8, types=True),
        text_config=_TEXT | {"model_type": "gemma"},
        vision_config=_SIGLIP,
        projection_dim=32,
        **_IMAGE_INDEX,
    ),
    _of(
        "gemma3-vision",
        "Gemma3:Gemma3ForConditionalGeneration",
        _pixels(2, 3, 8, 8, types=True),
        text_config=_TEXT | {"sliding_window": 16},
        vision_config=_SIGLIP,
        boi_token_index=_START,
        eoi_token_index=_END,
        mm_tokens_per_image=4,
        **_IMAGE_INDEX,
    ),
    _of(
        "idefics3",
        "Idefics3:Idefics3ForConditionalGeneration",
        _pixels(2, 1, 3, 8, 8),
        text_config=_TEXT | {"model_type": "llama"},
        vision_config=_VISION,
        scale_factor=1,
        image_token_id=_IMAGE,
        pad_token_id=0,
    ),
    _of(
        "internvl",
        "InternVL:InternVLForConditionalGeneration",
        _pixels(2, 3, 8, 8, tokens=1),
        text_config=_TEXT | {"model_type": "qwen2"},
        vision_config=_VISION | {"image_size": [8, 8], "patch_size": [4, 4]},
        downsample_ratio=0.5,
        image_seq_length=1,
        image_token_id=_IMAGE,
    ),
]
VISION = {architecture.name: architecture for architecture, _ in _ALL}
INPUTS = {architecture.name: inputs for architecture, inputs in _ALL}
"""Inputs of each model with an image a row, as its processor gives them."""
