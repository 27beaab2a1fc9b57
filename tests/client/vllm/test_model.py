"""The models that can take prefixes in vLLM, and the prefixes that fit them."""

from types import SimpleNamespace
from typing import Any

import pytest

from prefix_service.client.vllm.model import Model, refuse_model
from prefix_service.errors import DimensionMismatch, InvalidRequest

GPT2_MODEL = Model(num_layers=4, num_kv_heads=4, head_dim=8, dtype="float32", max_length=128)


def _spec(kind: str, **fields: Any) -> Any:
    """Returns a description of a layer's cache of a class with the name of vLLM's, by which it is recognised."""
    return type(kind, (SimpleNamespace,), {})(**fields)


_FULL, _WINDOW, _STATES = _spec("FullAttentionSpec"), _spec("SlidingWindowSpec"), _spec("MambaSpec")
_SEVERAL = _spec("UniformTypeKVCacheSpecs", kv_cache_specs={"layers.0": _FULL, "layers.1": _WINDOW})
_GEMMA4 = [(2, 32), (2, 32), (1, 64)]
"""The heads and head sizes of layers that differ."""


def _engine(**change: Any) -> tuple[Any, Any]:
    one = {
        "policy": "fail",
        "mla": False,
        "groups": [_FULL],
        "context": 1,
        "ranks": 1,
        "shapes": [(4, 8)] * 2,
        "draft": None,
        **change,
    }
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=one["policy"]),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=one["context"],
            tensor_parallel_size=one["ranks"],
            pipeline_parallel_size=1,
        ),
        model_config=_model_config(one["shapes"], use_mla=one["mla"]),
        speculative_config=one["draft"],
    )
    return config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in one["groups"]])


def _model_config(shapes: list[tuple[int, int]], **more: Any) -> Any:
    layers = [SimpleNamespace(num_key_value_heads=heads, head_dim=size) for heads, size in shapes]
    return SimpleNamespace(
        hf_text_config=SimpleNamespace(model_type="llama", per_layer_config=layers),
        get_total_num_hidden_layers=lambda: len(shapes),
        get_total_num_kv_heads=lambda: shapes[0][0],
        get_head_size=lambda: shapes[0][1],
        dtype="torch.float32",
        max_model_len=128,
        **more,
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"ranks": 2},
        {"draft": SimpleNamespace(method="ngram")},
        {"groups": [_FULL, _WINDOW, _WINDOW]},
        {"groups": [_SEVERAL, _spec("ChunkedLocalAttentionSpec")]},
        {"shapes": _GEMMA4},
    ],
)
def test_an_engine_whose_layers_keep_keys_and_values_is_accepted(change: dict[str, Any]) -> None:
    """Layers with windows of any kind, also in groups of their own, are accepted."""
    refuse_model(*_engine(**change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "recompute"}, "garbage"),
        ({"mla": True}, "MLA"),
        ({"groups": [_FULL, _STATES]}, "state-space layers"),
        ({"groups": [_spec("UniformTypeKVCacheSpecs", kv_cache_specs={"a": _STATES})]}, "state-space layers"),
        ({"groups": [_FULL, _spec("RSWASpec")]}, "layers of the kind RSWASpec are not"),
        ({"shapes": _GEMMA4, "ranks": 2}, "several tensor-parallel ranks"),
        ({"context": 2}, "context parallelism"),
        ({"draft": SimpleNamespace(method="eagle")}, "draft"),
    ],
)
def test_an_engine_in_which_prefixes_would_be_wrong_does_not_start(change: dict[str, Any], words: str) -> None:
    """Each such configuration is refused, and the error has the reason."""
    with pytest.raises(InvalidRequest, match=words):
        refuse_model(*_engine(**change))


def test_a_prefix_of_another_model_is_refused() -> None:
    """The error names the first size that differs."""
    told = {"tenant": "acme", "adapter": "a", "version": 1, "num_layers": 4, "num_kv_heads": 4, "head_dim": 8}
    GPT2_MODEL.check(told)
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        with pytest.raises(DimensionMismatch, match=rf"acme/a@1 has {name} 3, the model that vLLM serves has"):
            GPT2_MODEL.check({**told, name: 3})


def test_where_layers_differ_a_prefix_must_be_as_wide_as_the_widest() -> None:
    """Narrower layers take a part of the prefix, as in PEFT; a prefix that leaves a layer out is refused with words."""
    config, _ = _engine(shapes=_GEMMA4)
    model = Model.of(config)
    assert (model.num_layers, model.num_kv_heads, model.head_dim, model.layers_differ) == (3, 2, 64, True)
    told = {"tenant": "acme", "adapter": "a", "version": 1, "num_layers": 3, "num_kv_heads": 2, "head_dim": 64}
    model.check(told)
    for lacks in ({"num_kv_heads": 1}, {"head_dim": 32}):
        with pytest.raises(DimensionMismatch, match="leaves its wider layers without a prefix, which vLLM cannot"):
            model.check({**told, **lacks})
    for other in ({"num_kv_heads": 4}, {"head_dim": 128}, {"num_layers": 2}):
        with pytest.raises(DimensionMismatch, match="trained for another model"):
            model.check({**told, **other})
