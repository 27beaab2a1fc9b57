"""The sweep knows or excuses each of transformers' architectures; one of each mechanism is swept here."""

from pathlib import Path

import pytest

from tests.conftest import Server
from tests.sweep.expected import expected_outcomes
from tests.sweep.names import MAPPINGS, architectures
from tests.sweep.publishing import publishing
from tests.sweep.verdict import EQUAL, try_out

REPRESENTATIVE = {
    "decoder/llama": "rotary positions",
    "decoder/mistral": "a window shorter than the prefix and the row",
    "decoder/mpt": "ALiBi, which counts the slots of the cache",
    "decoder/bart": "learned positions, which count the slots of the cache",
    "decoder/roberta": "learned positions, which start behind those of the padding",
    "encoder-decoder/t5": "an encoder without positions",
    "vision/gemma3:image": "an image behind a window",
    "vision/qwen2_vl:image": "an image whose positions lie along three axes",
}


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_each_row_equals_that_row_alone_and_peft(name: str, server: Server, tmp_path: Path) -> None:
    with publishing(server) as fetch:
        verdict = try_out(architectures()[name], fetch, tmp_path)
    assert expected_outcomes()[name].is_met_by(verdict), verdict


def test_each_model_class_that_transformers_names_is_in_the_sweep() -> None:
    swept = {each.model for each in architectures().values()}
    assert swept == {model for mapping in MAPPINGS.values() for model in mapping.values()}


def test_each_architecture_has_an_expected_outcome() -> None:
    assert expected_outcomes().keys() == architectures().keys()


def test_an_outcome_that_is_not_equal_has_a_reason() -> None:
    assert not [name for name, each in expected_outcomes().items() if each.outcome != EQUAL and not each.reason]
