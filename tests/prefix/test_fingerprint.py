"""`prefix.fingerprint` bounds what a base model's fingerprint holds, and writes it in one way."""

import json
from typing import Any

import pytest

from prefix_service.errors import InvalidRequest, TooLarge
from prefix_service.prefix.fingerprint import (
    MOST_FINGERPRINT,
    NO_FINGERPRINT,
    Fingerprint,
    check_fingerprint,
    common_base_model,
)

WHOLE = {
    "weights_index": "sha256:1",
    "tokenizer": "sha256:2",
    "sizes": {"num_layers": 32, "hidden_size": 4096},
    "rope": {"rope_theta": 5e5, "rope_scaling": {"short_factor": [1.0, 1.5]}},
    "norms": {"rms_norm_eps": 1e-5},
    "architecture": "LlamaForCausalLM",
}


def test_it_is_written_in_one_way() -> None:
    """Equal fingerprints are written alike, whatever the order of their names, and one without fields is empty."""
    written = check_fingerprint(WHOLE)
    assert written == check_fingerprint(dict(reversed(WHOLE.items())))
    assert json.loads(written) == WHOLE
    assert written.startswith('{"architecture":"LlamaForCausalLM","norms":{')
    assert check_fingerprint({}) == ""


def test_it_is_read_again() -> None:
    """`Fingerprint.of` reads the fields that it knows and ignores those of a later release."""
    found = Fingerprint.of({**WHOLE, "attention": "sliding"})
    assert found.known() == WHOLE
    assert (found.architecture, found.norms) == ("LlamaForCausalLM", {"rms_norm_eps": 1e-5})
    assert Fingerprint.of({"rope": {}}) == Fingerprint(rope={})
    assert Fingerprint.of({}).known() == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention": "sliding"}, "and no 'attention'"),
        ({"architecture": None}, "architecture must be a text of 1 to 256 characters, got None"),
        ({"architecture": ""}, "architecture must be a text"),
        ({"tokenizer": "x" * 257}, "tokenizer must be a text"),
        ({"weights_index": 7}, "weights_index must be a text"),
        ({"sizes": [32]}, r"sizes must be a JSON object, got \[32\]"),
        ({"rope": dict.fromkeys(map(str, range(257)), 1)}, "rope has 257 members, and may have 256"),
        ({"rope": None}, "rope must be a JSON object"),
        ({"norms": "rms"}, "norms must be a JSON object"),
    ],
)
def test_what_it_may_not_hold_is_named(values: dict[str, Any], words: str) -> None:
    """The error names the field and the value that a fingerprint may not hold."""
    with pytest.raises(InvalidRequest, match=words):
        check_fingerprint(values)


def test_its_size_is_bounded() -> None:
    """A fingerprint may have `MOST_FINGERPRINT` bytes as stored, and one more is refused."""
    room = MOST_FINGERPRINT - len('{"sizes":{"x":""}}')
    assert len(check_fingerprint({"sizes": {"x": "y" * room}})) == MOST_FINGERPRINT
    with pytest.raises(TooLarge, match=f"has {MOST_FINGERPRINT + 1} bytes, and may have {MOST_FINGERPRINT}"):
        check_fingerprint({"sizes": {"x": "y" * (room + 1)}})


def test_a_number_in_float32_is_the_same_setting() -> None:
    """A GGUF file holds 1e-5 as the nearest float32; a setting that differs by more is another one."""
    norms = Fingerprint(norms={"rms_norm_eps": 1e-5})
    assert norms.differences(Fingerprint(norms={"rms_norm_eps": 9.999999747378752e-06})) == []
    assert norms.differences(Fingerprint(norms={"rms_norm_eps": 1e-6})) == [("norms.rms_norm_eps", 1e-5, 1e-6)]


def test_several_versions_have_the_settings_of_their_base_model_that_all_know() -> None:
    """What one of them does not know, and hashes of different kinds, are left out; the order does not matter."""
    whole = Fingerprint.of({**WHOLE, "weights_index": "sampled-bfloat16:1"})
    less = Fingerprint.of(
        {
            "architecture": "LlamaForCausalLM",
            "sizes": {"num_layers": 32, "vocab_size": 7},
            "rope": {"rope_theta": None, "rope_scaling": {"short_factor": [1.0, 1.5], "factor": 8.0}},
            "norms": {"eps": 1e-5},
            "weights_index": "sampled-float16:1",
        }
    )
    expected = {
        "architecture": "LlamaForCausalLM",
        "sizes": {"num_layers": 32},
        "rope": {"rope_scaling": {"short_factor": [1.0, 1.5]}},
    }
    for named in ([("a", whole), ("b", less)], [("b", less), ("a", whole), ("c", whole)]):
        assert common_base_model(named).known() == expected
    assert common_base_model([("a", whole), ("c", whole)]) == whole
    assert common_base_model([("a", whole), ("b", less), ("d", NO_FINGERPRINT)]) == NO_FINGERPRINT


def test_versions_of_different_base_models_have_none_in_common() -> None:
    """The error names the two that differ, behind others too, with the field and both values."""
    one, other = (Fingerprint(rope={"rope_theta": theta}) for theta in (1e4, 5e5))
    words = r"the base model of t/c has rope.rope_theta 500000.0, and that of t/b 10000.0: they cannot be composed"
    with pytest.raises(InvalidRequest, match=words):
        common_base_model([("t/a", NO_FINGERPRINT), ("t/b", one), ("t/c", other)])
