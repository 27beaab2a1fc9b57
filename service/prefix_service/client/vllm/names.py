"""Finds the adapters that an HTTP request names, and checks that it may name them. Imports no vLLM."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from prefix_service.client.vllm.bodies import HEADER
from prefix_service.client.vllm.config import ConnectorConfig
from prefix_service.client.vllm.requests import CONTAINER, PARAMETER, References, adapters_asked
from prefix_service.client.vllm.source import Source
from prefix_service.errors import InvalidReference, InvalidRequest, NotFound
from prefix_service.prefix.references import parse_qualified

MODEL: Final = "model"
FIELD: Final = f"{CONTAINER}.{PARAMETER}"
DEFAULT: Final = "kv_connector_extra_config.default_adapter"
_RUNTIME_LORA: Final = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"

log = logging.getLogger("vllm.prefix_service")


@dataclass(frozen=True, slots=True)
class Named:
    """The references of adapters, in their order, and the field of the request that has them."""

    references: References
    field: str = FIELD

    def __str__(self) -> str:
        return ", ".join(self.references)


class Served:
    """The names that vLLM itself serves: `models` is its `OpenAIServingModels`, None on a server that has none."""

    def __init__(self, models: Any) -> None:
        self._models = models

    def is_base(self, model: Any) -> bool:
        """Returns whether a request's `model` is a served base model, or left out."""
        return not model or self._models is None or bool(self._models.is_base_model(model))

    def has(self, model: str) -> bool:
        """Returns whether a name is a served model or a loaded LoRA."""
        return self.is_base(model) or model in self._models.lora_requests

    async def finds_lora(self, model: str) -> bool:
        """Returns whether one of vLLM's LoRA resolvers finds a LoRA of that name; vLLM then loads it."""
        allowed = os.environ.get(_RUNTIME_LORA, "0").strip().lower() in ("1", "true")  # as vLLM reads it
        if not allowed or not getattr(self._models, "lora_resolvers", None):
            return False
        await self._models.resolve_lora(model)
        return model in self._models.lora_requests


def adapters_named(
    fields: Mapping[str, Any],
    headers: Iterable[tuple[bytes, bytes]],
    served: Served,
    config: ConnectorConfig | None,
    *,
    has_default: bool,
) -> Named | None:
    """Returns the adapters that an HTTP request names, None if it names none.

    A `model` that vLLM does not serve names an adapter if it has the form of a reference; whether there is such an
    adapter is not known yet. `config` is None where the engine has no PrefixConnector. With `has_default`, the
    configured default applies to a request that names none.

    Raises:
        InvalidReference: `prefix_adapter` or the header is not of the form `tenant/adapter@…`.
        InvalidRequest: the request names other adapters in another field, or has a field that looks like an adapter and
            is none.
    """
    found = []
    references = adapters_asked(fields, None if config is None else config.other_parameters)
    if references:
        found.append(Named(references))
    for name, value in headers:
        if name.lower() == HEADER:
            reference = value.decode("latin-1").strip()
            parse_qualified(reference)
            found.append(Named((reference,), "X-Prefix-Adapter"))
    model = fields.get(MODEL)
    if isinstance(model, str) and not served.has(model) and config is not None and _is_reference(model):
        found.insert(0, Named((model,), MODEL))
    for one in found[1:]:
        if one.references != found[0].references:
            raise InvalidRequest(
                f"the request names {found[0]} in {found[0].field}, and {one} in {one.field}: name adapters in one "
                f"field; {FIELD} takes a list"
            )
    if not found and has_default and config is not None and config.default_adapter and served.is_base(model):
        return Named((config.default_adapter,), DEFAULT)
    return found[0] if found else None


def _is_reference(text: str) -> bool:
    try:
        parse_qualified(text)
    except InvalidReference:
        return False
    return True


class Permissions:
    """The adapters that requests may name: those that match a pattern of the configuration, or, without patterns, every
    one that the key reads. A key of the platform reads all tenants, so that without patterns it allows no adapter as
    `model`, and lists none."""

    def __init__(self, config: ConnectorConfig, source: Source) -> None:
        self._patterns, self._source = config.adapters, source
        self._has_warned = False

    async def require(self, named: Named) -> None:
        """Refuses adapters that requests may not name; the service decides whether the key reads them.

        Raises:
            NotFound: requests may not name one of them.
            PrefixServiceError: the service did not report whose key it is.
        """
        if named.field == DEFAULT:
            return
        has_models = named.field != MODEL or bool(await self.patterns())
        for reference in named.references:
            if not has_models or not self._allow(reference):
                raise NotFound(f"there is no {reference}")

    def _allow(self, reference: str) -> bool:
        adapter = reference.partition("@")[0]
        return self._patterns is None or any(fnmatchcase(adapter, pattern) for pattern in self._patterns)

    async def patterns(self) -> tuple[str, ...]:
        """Returns the patterns of the adapters that are listed.

        Raises:
            PrefixServiceError: the service did not report whose key it is.
        """
        if self._patterns is not None:
            return self._patterns
        tenant = await self._source.tenant()
        if tenant is None and not self._has_warned:
            self._has_warned = True
            log.warning(
                "the key is one of the platform: no adapter is listed, or accepted as a model, until adapters in "
                'kv_connector_extra_config has patterns such as "acme/*"'
            )
        return () if tenant is None else (f"{tenant}/*",)
