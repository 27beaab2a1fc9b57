"""The rows of `get_many`, without I/O and without torch: their references, and the row that an error is about."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefix_service.client.protocol import Work
from prefix_service.errors import InvalidReference, InvalidRequest, PrefixServiceError
from prefix_service.prefix.references import parse_qualified

if TYPE_CHECKING:
    from torch import Tensor

    from prefix_service.client.prefixes.mixed import MixedPrefix
    from prefix_service.client.prefixes.prefix import Prefix
    from prefix_service.client.protocol import Flow

Rows = Sequence[str | Sequence[str] | None]
"""One entry per row: `tenant/adapter@…`, a list of these (their prefixes are concatenated in order), or None."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The references of each row, with whether the caller gave a list; and the first row of each reference."""

    rows: list[tuple[tuple[str, ...], bool]]
    first_row: Mapping[str, int]

    @classmethod
    def of(cls, rows: Rows, batch_size: int | None) -> "Wanted":
        """Returns the checked rows.

        Raises:
            InvalidReference: an entry is not a reference; the message names the row.
            InvalidRequest: `rows` is one text, a list is empty, or `batch_size` differs from the number of rows.
        """
        if isinstance(rows, str | bytes):
            raise InvalidRequest(f"rows must be a list, one entry for each row, got {rows!r:.100}")
        if batch_size not in (None, len(rows)):
            raise InvalidRequest(f"batch_size is {batch_size}, and there are {len(rows)} rows")
        asked = []
        first_row: dict[str, int] = {}
        for index, row in enumerate(rows):
            is_list = row is not None and not isinstance(row, str)
            references = () if row is None else (row,) if isinstance(row, str) else tuple(row)
            if is_list and not references:
                raise InvalidRequest(f"row {index}: an empty list; a row without a prefix is None")
            for reference in references:
                first_row.setdefault(reference, index)
                try:
                    parse_qualified(reference)
                except InvalidReference as error:
                    raise of_row(index, error) from None
            asked.append((references, is_list))
        return cls(asked, first_row)


def of_row(index: int, error: PrefixServiceError) -> PrefixServiceError:
    """Returns the error with the row in its message."""
    error.message = f"row {index}: {error.message}"
    error.args = (error.message,)
    return error


def assembled(
    wanted: Wanted,
    prefixes: Mapping[str, "Prefix"],
    attention_mask: "Tensor | None",
    allocate: Callable[[int], memoryview],
) -> "Flow[MixedPrefix]":
    """Returns the batch, assembled from the prefix of each reference."""

    def assemble() -> "MixedPrefix":
        from prefix_service.client.prefixes import mixed

        return mixed.assemble(wanted.rows, prefixes, attention_mask, allocate)

    batch: MixedPrefix = yield Work(assemble)
    return batch
