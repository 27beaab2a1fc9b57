"""`prefix.fingerprint`: what a base model's fingerprint may hold, and the one way to write it."""

import json
from typing import Any

import pytest

from prefix_service.errors import InvalidRequest, TooLarge
from prefix_service.prefix.fingerprint import MOST_FINGERPRINT, Fingerprint, check_fingerprint

WHOLE = {
    "weights_index": "sha256:1",
    "tokenizer": "sha256:2",
    "sizes": {"num_layers": 32, "hidden_size": 4096},
    "rope": {"rope_theta": 5e5, "rope_scaling": {"short_factor": [1.0, 1.5]}},
    "norms": {"rms_norm_eps": 1e-5},
    "architecture": "LlamaForCausalLM",
}


def test_it_is_written_in_one_way() -> None:
    """Whatever the order of its names; without a field it is empty."""
    written = check_fingerprint(WHOLE)
    assert written == check_fingerprint(dict(reversed(WHOLE.items())))
    assert json.loads(written) == WHOLE
    assert written.startswith('{"architecture":"LlamaForCausalLM","norms":{')
    assert check_fingerprint({}) == ""


def test_it_is_read_again() -> None:
    """With what is known; fields of a later release are ignored."""
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
    """Field and value."""
    with pytest.raises(InvalidRequest, match=words):
        check_fingerprint(values)


def test_its_size_is_bounded() -> None:
    """In bytes of what is stored."""
    room = MOST_FINGERPRINT - len('{"sizes":{"x":""}}')
    assert len(check_fingerprint({"sizes": {"x": "y" * room}})) == MOST_FINGERPRINT
    with pytest.raises(TooLarge, match=f"has {MOST_FINGERPRINT + 1} bytes, and may have {MOST_FINGERPRINT}"):
        check_fingerprint({"sizes": {"x": "y" * (room + 1)}})
