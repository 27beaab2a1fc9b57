"""Compares the base model of each version with the model that vLLM serves. Imports no vLLM."""

import logging
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from prefix_service.checkpoints.base_models import folder_weights_hash, tokenizer_hash
from prefix_service.client.base_model_check import BaseModelCheck, mismatch
from prefix_service.client.flows.resolving import ResolvedVersion
from prefix_service.errors import BaseModelMismatch, InvalidInput
from prefix_service.prefix.base_model_settings import settings_of
from prefix_service.prefix.fingerprint import NO_FINGERPRINT, Fingerprint
from prefix_service.system.bounded import put_last

_MOST_WARNED: Final = 10_000

log = logging.getLogger("vllm.prefix_service")


class BaseModel:
    """The model that vLLM serves: its settings from vLLM's configuration; tokenizer and weights from its folder, or its
    snapshot in the cache of Hugging Face, if there is one."""

    def __init__(self, vllm_config: Any, mode: BaseModelCheck) -> None:
        self._config, self._mode = vllm_config.model_config, mode
        self._warned: dict[str, None] = {}

    def check(self, version: ResolvedVersion) -> None:
        """Warns once for each version that was made for another base model, or refuses it. Blocking: the first call
        reads files.

        Raises:
            BaseModelMismatch: it was, and that is refused.
        """
        if self._mode == "off" or version.base_model == NO_FINGERPRINT:
            return
        message = mismatch(
            f"{version.tenant}/{version.adapter}@{version.version}", version.base_model, self.fingerprint
        )
        if message is None:
            return
        if self._mode == "refuse":
            raise BaseModelMismatch(message)
        if version.reference not in self._warned:
            put_last(self._warned, version.reference, None, _MOST_WARNED)
            log.warning(message)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the model, as far as it can be read here."""
        found = NO_FINGERPRINT
        with suppress(InvalidInput):
            found = settings_of(self._config.hf_config.to_dict())
        with suppress(InvalidInput):
            if (folder := _folder(self._config.model, self._config.revision)) is not None:
                found = replace(found, weights_index=folder_weights_hash(folder))
        with suppress(InvalidInput):
            if (folder := _folder(self._config.tokenizer, self._config.tokenizer_revision)) is not None:
                found = replace(found, tokenizer=tokenizer_hash(folder))
        return found


def _folder(name: str, revision: str | None) -> Path | None:
    """Returns the folder of a model that is one, or was downloaded; None if its files are elsewhere."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(config).parent if isinstance(config, str) else None
    return None
