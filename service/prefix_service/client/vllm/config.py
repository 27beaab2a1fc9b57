"""`kv_connector_extra_config`: where the service is, in the words of `PrefixClient`."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from prefix_service.client.base_model_check import BaseModelCheck
from prefix_service.errors import InvalidReference, InvalidRequest
from prefix_service.prefix.references import parse_qualified

CONNECTOR: Final = "PrefixConnector"
MULTI_CONNECTOR: Final = "MultiConnector"
MODULE: Final = "prefix_service.client.vllm"
GARBAGE: Final = 'kv_load_failure_policy must be "fail": anything else answers with garbage where a prefix is missing'
_KEY_VARIABLE: Final = "PREFIX_API_KEY"
_PATTERN: Final = re.compile(r"[a-z0-9._*?-]+/[a-z0-9._*?-]+")


class ConnectorConfig(BaseModel):
    """The service's URL, where its key is found (a file, or an environment variable: vLLM logs this configuration),
    options of `AsyncPrefixClient`, which documents them, and parameters of other connectors. Each worker has
    `cache_bytes` for prefixes in host memory, those on their way included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    api_key_file: Path | None = None
    api_key_env: str = _KEY_VARIABLE
    uds: Path | None = None
    ca_file: Path | None = None
    timeout: float = 60.0
    cache_bytes: int = 1 << 30
    cache_dir: Path | None = None
    cache_dir_bytes: int = 10 << 30
    verify_digest: bool | None = None
    connections: int = 1
    shared_memory: bool = True
    base_model_check: BaseModelCheck = "warn"
    """What happens if an adapter was made for another base model: a warning in the log, an error (`refuse`), or
    nothing (`off`)."""
    other_parameters: frozenset[str] = frozenset()
    """Keys of `kv_transfer_params` that another connector reads."""
    default_adapter: str | None = None
    """The adapter of each request that names neither an adapter nor a LoRA."""
    adapters: tuple[str, ...] | None = None
    """Patterns `tenant/adapter`, with `*` and `?`, of the adapters that requests may name, and `GET /v1/models` lists.
    Without them these are the adapters of the key's tenant; with a key of the platform, requests name an adapter by
    `prefix_adapter` alone, and none is listed."""

    @field_validator("default_adapter")
    @classmethod
    def _well_formed(cls, given: str | None) -> str | None:
        if given is not None:
            try:
                parse_qualified(given)
            except InvalidReference as error:
                raise ValueError(error.message) from error
        return given

    @field_validator("adapters")
    @classmethod
    def _patterns(cls, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in given or ():
            if not _PATTERN.fullmatch(pattern):
                raise ValueError(f"{pattern!r:.100} is not of the form tenant/adapter, in which * and ? are wildcards")
        return given

    @model_validator(mode="before")
    @classmethod
    def _no_key_in_the_open(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "api_key" in given:
            raise ValueError(
                "vLLM writes its configuration to its log, so no key belongs there: name a file that holds it in "
                f"`api_key_file`, or an environment variable in `api_key_env` (default {_KEY_VARIABLE})"
            )
        return given

    @classmethod
    def of_engine(cls, kv_transfer_config: Any) -> Self:
        """Returns the configuration of the engine's `PrefixConnector`, which may be one of a `MultiConnector`'s.

        Raises:
            InvalidRequest: the engine has none, or its configuration is wrong.
        """
        own = None if kv_transfer_config is None else kv_transfer_config.kv_connector_extra_config
        if own is not None and "connectors" in own:
            found = [one for one in own["connectors"] if one.get("kv_connector") == CONNECTOR]
            own = found[0].get("kv_connector_extra_config", {}) if found else None
        if own is None:
            raise InvalidRequest(f"this engine runs without {CONNECTOR} (--kv-transfer-config)")
        return cls.of(own)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Reads the configuration from the JSON that vLLM was given.

        Raises:
            InvalidRequest: a key that is unknown or missing, or a value of another kind.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()]
            known = ", ".join(cls.model_fields)
            raise InvalidRequest(f"kv_connector_extra_config: {'; '.join(faults)}. It may have: {known}") from error

    def api_key(self) -> str | None:
        """Returns the key that the file or the environment has now.

        Raises:
            InvalidRequest: the file cannot be read.
        """
        if self.api_key_file is None:
            return os.environ.get(self.api_key_env) or None
        try:
            return self.api_key_file.read_text().strip()
        except OSError as error:
            raise InvalidRequest(f"api_key_file {self.api_key_file} cannot be read: {error}") from error


def refuse_partners(kv_transfer_config: Any) -> None:
    """Refuses a `MultiConnector` in which a request could be answered without its adapter.

    Raises:
        InvalidRequest: it is one.
    """
    connectors = kv_transfer_config.kv_connector_extra_config.get("connectors") or []
    names = [one.get("kv_connector") for one in connectors]
    policies = [kv_transfer_config.kv_load_failure_policy]
    policies += [one.get("kv_load_failure_policy", "fail") for one in connectors]
    reasons = {
        GARBAGE: any(policy != "fail" for policy in policies),
        f"its connectors must have one {CONNECTOR}, and have {names}": names.count(CONNECTOR) != 1,
        f"a {MULTI_CONNECTOR} inside of another is not supported": MULTI_CONNECTOR in names,
    }
    for reason, applies in reasons.items():
        if applies:
            raise InvalidRequest(f"{MULTI_CONNECTOR}: {reason}")
