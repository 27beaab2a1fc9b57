"""Base models are loaded without the output of the libraries that load them."""

import logging

from prefix_service.cli.models import quiet_transformers


def test_retries_of_the_hub_are_not_written() -> None:
    """The hub's client warns of each retry, in lines of 150 columns: none while a model is loaded, all afterwards."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.isEnabledFor(logging.WARNING)
    with quiet_transformers():
        assert not hub.isEnabledFor(logging.WARNING)
        assert hub.isEnabledFor(logging.ERROR)
    assert hub.isEnabledFor(logging.WARNING) == before
