"""The changes that are interrupted: every change of a data folder, each on a folder where it has something to do."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import anyio
from anyio import to_thread

from prefix_service.catalog.catalog import Catalog
from prefix_service.catalog.records import COMMAND_LINE
from prefix_service.data_folder.opening import opened
from prefix_service.library.arrivals import Target
from prefix_service.library.publishing import Publisher
from prefix_service.prefix.config import parse_config
from prefix_service.prefix.json_text import parse_json
from prefix_service.prefix.references import parse_reference
from tests.conftest import CORPUS
from tests.crash.folder import Service, serving, settings_of

CASES: Final = ("gpt2-n20-proj", "llama-n20-emb", "opt-n20-emb", "llama-cartridge-n20-f1", "t5-n20-emb")
"""The cases of the corpus that are uploaded; the first has an MLP."""
_OTHERS: Final = ("gemma2-n20-emb", "llama-n20-emb-bf16base")  # what is there before
_PIECE: Final = 5000  # bytes of an upload that are written at once

Change = Callable[[], object]
Act = Callable[[Path, str], AbstractContextManager[Change]]


async def publish(publisher: Publisher, tenant: str, adapter: str, case: str) -> None:
    """Uploads a corpus case as the API does."""
    directory = CORPUS / "cases" / case / "adapter"
    config = parse_config(parse_json((directory / "adapter_config.json").read_bytes(), "the config"), from_file=True)
    weights = (directory / "adapter_model.safetensors").read_bytes()
    target = Target(tenant, adapter, COMMAND_LINE, make_tenant=True)
    async with publisher.receiving(target, 0) as upload:
        for start in range(0, len(weights), _PIECE):
            await upload.take(partial(upload.write, weights[start : start + _PIECE]))
        await publisher.publish(upload, config)


def _publish(service: Service, case: str) -> Change:
    return partial(anyio.run, publish, service.cases.publisher, "acme", "a", case)


def _publish_again(service: Service, _: str) -> Change:
    return _publish(service, _OTHERS[0])


def _move(service: Service, _: str) -> Change:
    put = partial(Catalog(service.database).put_alias, "acme", "a", "prod", 2, COMMAND_LINE)
    return partial(anyio.run, to_thread.run_sync, put)


def _delete(service: Service, _: str) -> Change:
    return partial(anyio.run, service.cases.adapters.delete, "acme", parse_reference("a@2"), COMMAND_LINE)


def _delete_tenant(service: Service, _: str) -> Change:
    return partial(anyio.run, service.cases.tenancy.delete, "acme", COMMAND_LINE)


def _collect(service: Service, _: str) -> Change:
    return service.collector().collect


def _remove(service: Service, _: str) -> Change:
    return service.remove_deleted


def _while_serving(change: Callable[[Service, str], Change]) -> Act:
    """Returns an act whose service runs already when the change begins."""

    @contextmanager
    def act(data_dir: Path, case: str) -> Iterator[Change]:
        with serving(data_dir) as service:
            yield change(service, case)

    return act


@contextmanager
def _start(data_dir: Path, _case: str) -> Iterator[Change]:
    yield partial(start, data_dir)


def start(data_dir: Path) -> None:
    """Starts and stops a service; the first start makes the folder."""
    with opened(settings_of(data_dir)):
        pass


def nothing(_data_dir: Path) -> None:
    """Makes no folder."""


def one_tenant(data_dir: Path) -> None:
    """Makes a folder where only another tenant has something, with content that comes again."""
    start(data_dir)
    with serving(data_dir) as service:
        anyio.run(publish, service.cases.publisher, "beta", "b", _OTHERS[0])


def two_tenants(data_dir: Path) -> None:
    """Makes a folder with two versions and an alias; another tenant shares the first version's blobs."""
    one_tenant(data_dir)
    with serving(data_dir) as service:
        for case in _OTHERS:
            anyio.run(publish, service.cases.publisher, "acme", "a", case)
        Catalog(service.database).put_alias("acme", "a", "prod", 1, COMMAND_LINE)


def with_garbage(data_dir: Path) -> None:
    """Makes a folder with two tenants, one of which has deleted a version."""
    two_tenants(data_dir)
    with serving(data_dir) as service:
        _delete(service, "")()


def with_deleted_tenant(data_dir: Path) -> None:
    """Makes a folder with two tenants, one of which was deleted and still has its rows."""
    two_tenants(data_dir)
    with serving(data_dir) as service:
        _delete_tenant(service, "")()


@dataclass(frozen=True, slots=True)
class Operation:
    """A change and the folder that it is made on; whether making it twice is making it once, and whether a service runs
    already when it begins.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Act
    repeatable: bool = True
    serves: bool = True


OPERATIONS: Final = {
    operation.name: operation
    for operation in (
        Operation("first start", nothing, _start, serves=False),
        Operation("first publish", one_tenant, _while_serving(_publish)),
        Operation("second version", two_tenants, _while_serving(_publish)),
        Operation("same content", two_tenants, _while_serving(_publish_again)),
        Operation("alias move", two_tenants, _while_serving(_move)),
        Operation("deletion", two_tenants, _while_serving(_delete), repeatable=False),
        Operation("tenant deletion", two_tenants, _while_serving(_delete_tenant), repeatable=False),
        Operation("removal", with_deleted_tenant, _while_serving(_remove)),
        Operation("collection", with_garbage, _while_serving(_collect)),
    )
}
