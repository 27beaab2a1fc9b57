"""The versions that a request means: what its references stand for once they are resolved."""

from dataclasses import dataclass
from typing import Any

from prefix_service.client.vllm.requests import PARAMETER, References
from prefix_service.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Version:
    """The version that a reference means now; immutable, so that all ranks load the same bytes."""

    tenant: str
    adapter: str
    number: int
    digest: str
    num_virtual_tokens: int

    @property
    def reference(self) -> str:
        """Its immutable name."""
        return f"{self.tenant}/{self.adapter}@{self.digest}"


@dataclass(frozen=True, slots=True)
class Composition:
    """The versions that a request's references mean now, at least one, in the order of their prefixes."""

    versions: tuple[Version, ...]

    @property
    def tenant(self) -> str:
        """The tenant that the fetch of the bytes is charged to."""
        return self.versions[0].tenant

    @property
    def references(self) -> References:
        """The immutable names."""
        return tuple(version.reference for version in self.versions)

    @property
    def name(self) -> str:
        """The adapters and their versions, for people."""
        return ", ".join(f"{version.adapter}@{version.number}" for version in self.versions)

    @property
    def num_virtual_tokens(self) -> int:
        """The number of tokens of all prefixes."""
        return sum(version.num_virtual_tokens for version in self.versions)

    @property
    def parameter(self) -> str | list[str]:
        """The value of `prefix_adapter` that names exactly these versions."""
        references = list(self.references)
        return references if len(references) > 1 else references[0]

    @property
    def answer_parameters(self) -> dict[str, Any]:
        """The `kv_transfer_params` of an answer."""
        numbers = [version.number for version in self.versions]
        return {PARAMETER: self.parameter, "prefix_version": numbers if len(numbers) > 1 else numbers[0]}


def refuse_length(composition: Composition, prompt: int, max_length: int) -> None:
    """Refuses a prompt of `prompt` tokens that leaves no room for an answer behind its prefixes.

    Raises:
        InvalidRequest: there is no room.
    """
    count = composition.num_virtual_tokens
    if count + prompt >= max_length:
        raise InvalidRequest(
            f"{composition.name} has {count} virtual tokens: with the prompt's {prompt} there is no "
            f"room for an answer in vLLM's max_model_len {max_length}"
        )
