"""Downloads an adapter from the Hugging Face Hub, or from the hub that HF_ENDPOINT names, with its own client."""

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from prefix_service.checkpoints.remote.address import Address
from prefix_service.checkpoints.remote.wanted import MOST_FILES, files_at, wanted_files
from prefix_service.errors import (
    ConnectionFailed,
    Forbidden,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    PrefixServiceError,
    Unauthenticated,
)

_SECONDS: Final = 30.0
# Of the HTTP library that this version of huggingface_hub uses, httpx or its successor.
_HTTP_ERROR: Final[type[Exception]] = HfHubHTTPError.__mro__[1]
_ERRORS: Final[tuple[tuple[type[Exception], type[PrefixServiceError], str], ...]] = (
    (GatedRepoError, Forbidden, "{place} is gated: accept its terms on the hub, and set HF_TOKEN"),
    (
        RepositoryNotFoundError,
        NotFound,
        "there is no repository {place} on the hub, or the token may not see it: look at the name, and set HF_TOKEN",
    ),
    (RevisionNotFoundError, NotFound, "{place} has no revision {revision}: name a branch, a tag or a commit"),
    (LocalEntryNotFoundError, ConnectionFailed, "the hub did not send a file of {address}: try again"),
    (EntryNotFoundError, NotFound, "a file of {address} is gone: name another revision"),
    (HFValidationError, InvalidRequest, "{address} is no address that the hub knows: give hf://owner/repo@revision"),
    (HfHubHTTPError, InvalidRequest, "the hub refused {address} with status {status}"),
    (FileMetadataError, InvalidResponse, "what the hub says of a file of {address} is incomplete: look at HF_ENDPOINT"),
    (
        XetDownloadError,
        InvalidResponse,
        "a file of {address} cannot be downloaded: try again with HF_HUB_DISABLE_XET=1",
    ),
    (OfflineModeIsEnabled, ConnectionFailed, "HF_HUB_OFFLINE is set: unset it to download"),
    (_HTTP_ERROR, ConnectionFailed, "the hub did not answer for {address}: {kind}"),
)
"""The hub's errors, the most specific first, this project's, and what these say."""


def download(address: Address, folder: Path, most: int) -> tuple[Path, dict[str, str]]:
    """Downloads an adapter's files to `folder`; returns the path of its weights, and annotations that say where they
    come from.

    The revision is resolved to a commit first, and all files are of that commit. `most` bounds the weights' bytes.

    Raises:
        NotFound: there is no such repository, revision or path, or the token may not see it.
        Unauthenticated, Forbidden: the repository wants a token, or consent to its terms.
        InvalidCheckpoint, TooLarge: the files are not those of an adapter.
        InvalidRequest, InvalidResponse, ConnectionFailed: the hub refused, sent something else than it announced, or
            did not answer.
    """
    api = HfApi()
    with _translated(address):
        info = api.model_info(address.place, revision=address.revision, files_metadata=True, timeout=_SECONDS)
        if info.sha is None or info.siblings is None:
            raise InvalidResponse(f"the hub does not say which commit {address} is")
        if len(info.siblings) > MOST_FILES:
            raise InvalidRequest(
                f"{address.place} has {len(info.siblings)} files, and at most {MOST_FILES} are looked at"
            )
        listing = {file.rfilename: file.size for file in info.siblings if file.size is not None}
        inside, sizes = files_at(listing, address.path)
        weights, names = wanted_files(sizes, most)
        for name in names:
            remote = f"{inside}/{name}" if inside else name
            found = Path(api.hf_hub_download(address.place, remote, revision=info.sha, local_dir=folder / "hub"))
            # The file has its path in the repository; what it is goes by its name alone.
            if found.stat().st_size != sizes[name]:
                raise InvalidResponse(f"{remote} has {found.stat().st_size} bytes, and the hub announced {sizes[name]}")
            found.rename(folder / name)
    resolved = Address("hf", address.place, info.sha, address.path)
    return folder / weights, {"source": str(resolved), "source.revision": address.revision or "main"}


@contextlib.contextmanager
def _translated(address: Address) -> Iterator[None]:
    """Turns the hub's errors into this project's, without its URLs; keeps its bars from the terminal."""
    disable_progress_bars()
    try:
        yield
    except tuple(kind for kind, _, _ in _ERRORS) as error:
        raise _error(address, error) from error


def _error(address: Address, error: Exception) -> PrefixServiceError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status == HTTPStatus.UNAUTHORIZED and not isinstance(error, RepositoryNotFoundError):
        return Unauthenticated(f"the hub wants a token for {address.place}: set HF_TOKEN")
    ours, text = next((ours, text) for kind, ours, text in _ERRORS if isinstance(error, kind))
    shown = {"address": address, "place": address.place, "revision": address.revision, "status": status}
    return ours(text.format(**shown, kind=type(error).__name__))
