"""`prefix.checkpoint` reads every layout of a trained prefix, wherever it stands in a file."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from prefix_service.errors import InvalidCheckpoint, InvalidConfig
from prefix_service.prefix.checkpoint import PrefixWeights, load_weights
from prefix_service.prefix.config import PrefixConfig, parse_config
from prefix_service.prefix.layouts import find_prefix

N, L, H, D, HIDDEN = 5, 3, 2, 4, 6
TOKEN_DIM, WIDTH = H * D, L * 2 * H * D

Tensors = dict[str, Tensor]
Renamed = Callable[[Tensors], Tensors]

EMBEDDING: Tensors = {"embedding": torch.randn(N, WIDTH)}
PROJECTION: Tensors = {
    "embedding": torch.randn(N, TOKEN_DIM),
    "transform.w1": torch.randn(HIDDEN, TOKEN_DIM),
    "transform.b1": torch.randn(HIDDEN),
    "transform.w2": torch.randn(WIDTH, HIDDEN),
    "transform.b2": torch.randn(WIDTH),
}
CARTRIDGE: Tensors = {"frozen_embedding": torch.randn(2, WIDTH), "trainable_embedding": torch.randn(N - 2, WIDTH)}
PEFT = {
    "embedding": "embedding.weight",
    "transform.w1": "transform.0.weight",
    "transform.b1": "transform.0.bias",
    "transform.w2": "transform.2.weight",
    "transform.b2": "transform.2.bias",
}


def config(peft_type: str = "PREFIX_TUNING", **values: Any) -> PrefixConfig:
    sizes = {"num_virtual_tokens": N, "num_layers": L, "num_attention_heads": H, "token_dim": TOKEN_DIM}
    return parse_config({"peft_type": peft_type, **sizes, **values})


PLAIN = config()
PROJECTED = config(prefix_projection=True, encoder_hidden_size=HIDDEN)


def load(tensors: Tensors, wanted: PrefixConfig) -> PrefixWeights:
    return load_weights(
        bytearray(save({name: tensor.clone().contiguous() for name, tensor in tensors.items()})), wanted
    )


def peft_state(tensors: Tensors) -> Tensors:
    return {PEFT.get(name, name): tensor for name, tensor in tensors.items()}


def hf_peft_ex(tensors: Tensors) -> Tensors:
    return {name: tensor.T if ".w" in name else tensor for name, tensor in tensors.items()}


def p_tuning_v2(tensors: Tensors) -> Tensors:
    return {f"prefix_encoder.{PEFT[n].replace('transform', 'trans')}": t for n, t in tensors.items()}


def under(scope: str, names: Renamed = peft_state) -> Renamed:
    return lambda tensors: {scope + name: tensor for name, tensor in names(tensors).items()}


def fsdp(tensors: Tensors) -> Tensors:
    scope = "_fsdp_wrapped_module.prompt_encoder.default._fsdp_wrapped_module."
    return {
        scope + n.replace("embedding.", "embedding._fsdp_wrapped_module."): t for n, t in peft_state(tensors).items()
    }


def checkpointed(tensors: Tensors) -> Tensors:
    return {n.replace("transform.", "transform._checkpoint_wrapped_module."): t for n, t in peft_state(tensors).items()}


# The places in which training frameworks leave a prompt encoder, and the layout of each.
PLACES: dict[str, tuple[str, Renamed]] = {
    "encoder": ("PEFT training state", peft_state),
    "accelerate": ("PEFT training state", under("prompt_encoder.default.")),
    "another-adapter-name": ("PEFT training state", under("prompt_encoder.my-adapter_2.")),
    "ddp": ("PEFT training state", under("module.prompt_encoder.default.")),
    "lightning": ("PEFT training state", under("model.prompt_encoder.default.")),
    "lightning-ddp-compiled": ("PEFT training state", under("module.model._orig_mod.prompt_encoder.default.")),
    "compiled-encoder": ("PEFT training state", under("_orig_mod.")),
    "fsdp": ("PEFT training state", fsdp),
    "activation-checkpointing": ("PEFT training state", checkpointed),
    "hf_peft_ex": ("hf_peft_ex", hf_peft_ex),
    "hf_peft_ex-model": ("hf_peft_ex", under("prefix_encoder.", hf_peft_ex)),
    "p-tuning-v2": ("P-tuning v2", p_tuning_v2),
    "chatglm": ("P-tuning v2", under("transformer.", p_tuning_v2)),
    "chatglm-ddp": ("P-tuning v2", under("module.transformer.", p_tuning_v2)),
}

BASE_MODEL: Tensors = {
    "base_model.model.wte.weight": torch.zeros(3, 4),
    "base_model.model.h.0.attn.c_attn.bias": torch.zeros(7),
    "base_model.score.weight": torch.zeros(2, 4),
    "base_model.classifier.bias": torch.zeros(2),
    "base_model.qa_outputs.weight": torch.zeros(2, 4),
    "word_embeddings.weight": torch.zeros(3, 4),
    "transformer.embedding.word_embeddings.weight": torch.zeros(3, 4),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("tensors", "wanted"), [(EMBEDDING, PLAIN), (PROJECTION, PROJECTED)], ids=["plain", "mlp"])
def test_a_prefix_is_found_where_training_left_it(place: str, tensors: Tensors, wanted: PrefixConfig) -> None:
    """Loading finds a prefix among a model's tensors by its roles, whatever its names, and transposes no matrix."""
    layout, rename = PLACES[place]
    found = load(rename(tensors) | BASE_MODEL, wanted)
    assert found.layout == layout
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[role], tensor) for role, tensor in tensors.items())


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
def test_what_peft_saved_is_flat(peft_type: str) -> None:
    """PEFT saves one flat tensor: loading ignores the projection in its config and a task head in the same file."""
    flat = torch.randn(N, WIDTH)
    wanted = config(peft_type, inference_mode=True, prefix_projection=True)
    found = load({"prompt_embeddings": flat} | BASE_MODEL, wanted)
    assert (found.layout, found.dtype) == ("PEFT saved", torch.float32)
    assert torch.equal(found.tensors["prompt_embeddings"], flat)


@pytest.mark.parametrize("place", ["encoder", "accelerate", "compiled-encoder"])
def test_a_cartridge_in_training(place: str) -> None:
    """Loading keeps the frozen rows of a cartridge apart from its trainable ones."""
    found = load(PLACES[place][1](CARTRIDGE), config("CARTRIDGE", num_frozen_tokens=2))
    assert found.layout == "CARTRIDGE training state"
    assert {role: tensor.shape[0] for role, tensor in found.tensors.items()} == {
        "frozen_embedding": 2,
        "trainable_embedding": N - 2,
    }


def test_a_cartridge_without_frozen_tokens() -> None:
    """PEFT writes no frozen tensor for a cartridge without frozen tokens, and loading accepts that."""
    found = load({"trainable_embedding": torch.randn(N, WIDTH)}, config("CARTRIDGE", num_frozen_tokens=0))
    assert found.tensors.keys() == {"trainable_embedding"}


def test_chatglm2_embeds_the_whole_width() -> None:
    """ChatGLM2's MLP is as wide at its entrance as at its end, and loading accepts it."""
    wide = PROJECTION | {"embedding": torch.randn(N, WIDTH), "transform.w1": torch.randn(HIDDEN, WIDTH)}
    found = load(under("transformer.", p_tuning_v2)(wide), PROJECTED)
    assert found.tensors["transform.w1"].shape == (HIDDEN, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stored_dtype_is_told(dtype: torch.dtype) -> None:
    """`dtype` is the one in which every tensor of the prefix is stored, or float32 for a mixture."""
    halves = {name: tensor.to(dtype) for name, tensor in peft_state(PROJECTION).items()}
    assert load(halves, PROJECTED).dtype == dtype
    assert load(halves | {"embedding.weight": PROJECTION["embedding"]}, PROJECTED).dtype == torch.float32


def test_nothing_is_copied() -> None:
    """The loaded tensors are views of the bytes that were read."""
    data = bytearray(save({"prompt_embeddings": torch.zeros(N, WIDTH)}))
    weights = load_weights(data, PLAIN)
    weights.tensors["prompt_embeddings"].fill_(1.0)
    assert data[-4:] == b"\0\0\x80\x3f"


def without(name: str) -> Tensors:
    return {n: t for n, t in peft_state(PROJECTION).items() if n != name}


SECOND = {f"prompt_encoder.b.{name}": tensor for name, tensor in peft_state(EMBEDDING).items()}
BAD_VALUE = torch.zeros(N, WIDTH).index_fill_(0, torch.tensor([2]), float("nan"))


@pytest.mark.parametrize(
    ("tensors", "wanted", "message"),
    [
        (BASE_MODEL, PLAIN, "no prefix encoder among 7 tensors .base_model.classifier.bias, .*; known layouts: PEFT"),
        ({"embedding.weights": torch.zeros(1)}, PLAIN, "no prefix encoder among 1 tensors .embedding.weights.;"),
        (peft_state(EMBEDDING) | SECOND, PLAIN, "more than one prefix encoder.*embedding.weight.*prompt_encoder.b.emb"),
        (peft_state(EMBEDDING) | {"prompt_embeddings": EMBEDDING["embedding"]}, PLAIN, "more than one prefix encoder"),
        (peft_state(EMBEDDING) | under("_orig_mod.")(EMBEDDING), PLAIN, "more than one prefix encoder"),
        (
            without("embedding.weight"),
            PROJECTED,
            "incomplete prefix encoder .PEFT training state.: found .*; missing embedding.weight$",
        ),
        (
            without("transform.2.bias"),
            PROJECTED,
            "incomplete .*: found embedding.weight, .*; missing transform.2.bias$",
        ),
        ({"trans.0.weight": torch.zeros(1)}, PROJECTED, "no prefix encoder"),
        (
            {"prefix_encoder.trans.0.bias": torch.zeros(1)},
            PROJECTED,
            "missing prefix_encoder.embedding.weight, prefix_",
        ),
        ({"frozen_embedding": torch.zeros(1, WIDTH)}, config("CARTRIDGE"), "missing trainable_embedding"),
        (
            {"trainable_embedding": torch.zeros(N - 1, WIDTH)},
            config("CARTRIDGE"),
            "num_frozen_tokens is 1 .* lacks frozen_",
        ),
        (CARTRIDGE, config("CARTRIDGE", num_frozen_tokens=0), "num_frozen_tokens is 0 .* holds frozen_embedding"),
        (peft_state(PROJECTION), PLAIN, "prefix_projection is false in the config, .* holds the projection"),
        (peft_state(EMBEDDING), PROJECTED, "prefix_projection is true in the config, .* lacks the projection"),
        (
            peft_state(EMBEDDING),
            config("CARTRIDGE"),
            "PEFT training state tensors do not belong to peft_type CARTRIDGE",
        ),
        (CARTRIDGE, PLAIN, "CARTRIDGE training state tensors do not belong to peft_type PREFIX_TUNING"),
        (
            CARTRIDGE,
            config("CARTRIDGE", num_frozen_tokens=1),
            r"frozen_embedding has shape \[2, 48\], .*frozen_tokens=1",
        ),
        ({"prompt_embeddings": torch.zeros(N, WIDTH - 1)}, PLAIN, r"has shape \[5, 47\], .* num_layers=3, token_dim=8"),
        (
            {"prompt_embeddings": torch.zeros(WIDTH, N)},
            PLAIN,
            r"prompt_embeddings has shape \[48, 5\], the config requires",
        ),
        (
            hf_peft_ex(PROJECTION) | {"transform.w1": torch.zeros(HIDDEN, TOKEN_DIM)},
            PROJECTED,
            r"w1 has shape \[6, 8\]",
        ),
        (peft_state(PROJECTION), config(prefix_projection=True, encoder_hidden_size=7), "encoder_hidden_size=7"),
        ({"prompt_embeddings": BAD_VALUE}, PLAIN, "prompt_embeddings holds NaN or infinite values"),
        ({"prompt_embeddings": torch.zeros(N, WIDTH, dtype=torch.int64)}, PLAIN, "has dtype 'I64'"),
    ],
)
def test_a_checkpoint_that_is_refused(tensors: Tensors, wanted: PrefixConfig, message: str) -> None:
    """A prefix that is missing, ambiguous, incomplete or of a wrong kind or size is refused by name."""
    with pytest.raises(InvalidCheckpoint, match=message):
        load(tensors, wanted)


def test_a_config_without_dimensions_is_refused_first() -> None:
    """Loading parses no file for a config that the tensors cannot be checked against."""
    with pytest.raises(InvalidConfig, match="num_layers, token_dim, num_attention_heads missing"):
        load_weights(bytearray(b"not even a file"), parse_config({"peft_type": "PREFIX_TUNING"}))


def test_a_long_list_of_names_is_cut() -> None:
    """An error names at most eight of a model's thousands of tensors."""
    with pytest.raises(InvalidCheckpoint, match="no prefix encoder among 1000 tensors") as caught:
        find_prefix({f"layer.{n}": (1,) for n in range(1000)})
    assert caught.value.message.count("layer.") == 8
