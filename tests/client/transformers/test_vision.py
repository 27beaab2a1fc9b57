"""In models that take images `generate` gives PEFT's tokens, positions of several dimensions included."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration

from prefix_service.client.transformers.generation import generate
from prefix_service.client.transformers.padding import padding_shows
from prefix_service.errors import InvalidRequest
from tests.architectures import VOCABULARY
from tests.client.conftest import Pairs, Peft
from tests.vision import INPUTS, VISION

pytestmark = [
    # This is transformers' warning, for a property that PEFT reads.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # This is PEFT's warning, for an adapter without a base model's name, and for the types of tokens that it drops.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Token type ids are not supported:UserWarning"),
]

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
PATCHED = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "glm4v"]
"""Models with positions along time, height and width."""

base = cache(lambda name: VISION[name].build())
vision = pytest.mark.parametrize("name", VISION)


@vision
def test_an_image_behind_a_prefix_gives_what_peft_gives(name: str, pairs: Pairs, peft_model: Peft) -> None:
    inputs = INPUTS[name]() | OPTIONS
    expected = peft_model(name).generate(**inputs)
    found = generate(base(name), pairs(name), **inputs)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=5e-5)
    bare = base(name).generate(**inputs)
    assert (torch.stack(found.logits) - torch.stack(bare.logits)).abs().max() > 0.1, "the prefix must matter"


@vision
def test_beams_have_their_own_image(name: str, pairs: Pairs, peft_model: Peft) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    inputs = INPUTS[name]()
    expected = peft_model(name).generate(**inputs, **options)
    assert torch.equal(generate(base(name), pairs(name), **inputs, **options), expected)


@pytest.mark.parametrize("name", PATCHED)
def test_positions_have_the_dimensions_that_the_model_gives_them(name: str, pairs: Pairs) -> None:
    """A patch's time, height and width follow the prefix, and a text's token has one position."""
    seen = []
    model = VISION[name].build()
    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(lambda _m, _a, options: seen.append(options["position_ids"]), with_kwargs=True)
    generate(model, pairs(name), **INPUTS[name](), max_new_tokens=2)
    tokens = VISION[name].num_virtual_tokens
    time, height, width = (seen[0][-3:, 0, 3:7] - tokens).tolist()
    assert (time, height, width) == ([3, 3, 3, 3], [3, 3, 4, 4], [3, 4, 3, 4])
    assert seen[1][-1, 0, 0] == tokens + 10, "twelve tokens, of which the image takes two positions"


@vision
def test_right_padded_rows_with_images(name: str, pairs: Pairs, peft_model: Peft) -> None:
    """Types of tokens move with right-padded rows, and images find their tokens by the placeholders."""
    inputs = INPUTS[name]()
    expected = peft_model(name).generate(**inputs, **OPTIONS)
    for kind in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if kind in inputs:
            inputs[kind][1] = inputs[kind][1].roll(-2)
    if name in ("gemma3-vision", "hyperclovax"):  # its window is shorter than the row; it takes no positions
        with pytest.raises(InvalidRequest, match=r"pixel_values.* cannot be served with right padding"):
            generate(base(name), pairs(name), **inputs, **OPTIONS)
        return
    found = generate(base(name), pairs(name), **inputs, **OPTIONS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=5e-5)


def test_a_tensor_that_may_belong_to_tokens_is_refused_with_right_padding(pairs: Pairs) -> None:
    ids = torch.randint(3, 50, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with pytest.raises(InvalidRequest, match="image_embeds_position_mask cannot be served with right padding; pad on"):
        generate(base("llava"), pairs("llava"), ids, mask, image_embeds_position_mask=mask, max_new_tokens=2)


def _mllama() -> Any:
    text: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "cross_attention_layers": [1],
        "vocab_size": VOCABULARY,
    }
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "attention_heads": 2}
    vision |= {"num_global_layers": 1, "image_size": 8, "patch_size": 4, "max_num_tiles": 1, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.15}
    torch.manual_seed(11)
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision)).requires_grad_(False)


def test_a_mask_of_cross_attention_is_refused(pairs: Pairs) -> None:
    """The prefix fills Mllama's cross-attention layers too, as in PEFT, which then do not fit their mask."""
    inputs = {"pixel_values": torch.zeros(1, 1, 1, 3, 8, 8), "cross_attention_mask": torch.ones(1, 4, 1, 1)}
    with pytest.raises(InvalidRequest, match="cross_attention_mask cannot be served behind a prefix"):
        generate(_mllama(), pairs("llava"), torch.ones(1, 4).long(), **inputs)


def test_cross_attention_layers_count_padding(pairs: Pairs) -> None:
    """Without an image these layers read the prefix in the input's order, so right-padded rows go without padding."""
    model = _mllama().eval()
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(7))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    scores: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda _model, _inputs, output: scores.append(output.logits[:, -1]))
    generate(model, pairs("llava"), ids * mask, mask, max_new_tokens=1)
    hook.remove()
    short, _ = scores
    alone = generate(model, pairs("llava"), ids[1:, :3], **OPTIONS | {"max_new_tokens": 1})
    torch.testing.assert_close(short, alone.logits[0], rtol=0, atol=1e-6)


def test_a_model_that_drops_its_positions_counts_padding(pairs: Pairs, peft_model: Peft) -> None:
    """A model whose `generate` passes no positions counts from the cache's length, and so counts padding."""
    assert padding_shows(base("hyperclovax"), 12)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(7))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    found = generate(base("hyperclovax"), pairs("hyperclovax"), ids * mask, mask, max_new_tokens=6)
    alone = peft_model("hyperclovax").generate(input_ids=ids[1:, :3], attention_mask=mask[1:, :3], max_new_tokens=6)
    assert torch.equal(found[1, 6:], alone[0, 3:])
