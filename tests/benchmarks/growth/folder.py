"""Writes rows and small blobs of many adapters straight into a data folder."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from prefix_service.catalog.database import Database
from prefix_service.catalog.schema import adapters, audit, numbers, tenants, versions
from prefix_service.data_folder.opening import blob_folder, catalog_file

BIG: Final = "big"
"""The tenant that has the many adapters."""

_TOGETHER: Final = 5000  # rows of an insertion
_LONG_AGO: Final = 1_000_000_000  # when the blobs were written, so that no grace period keeps them


def fill(data_dir: Path, count: int) -> None:
    """Gives `BIG`, which has one adapter that was published over HTTP, so many more, each with two blobs of its own. No
    service may run meanwhile.
    """
    blobs = blob_folder(data_dir)
    for number in range(256):
        (blobs / f"{number:02x}").mkdir(exist_ok=True)
    database = Database(catalog_file(data_dir))
    try:
        with database.reading() as connection:
            owner = connection.scalar(sa.select(tenants.c.id).where(tenants.c.name == BIG))
            template = connection.execute(sa.select(versions)).one()._asdict()
            first = connection.scalar(sa.select(sa.func.max(adapters.c.id))) or 0
        for begin in range(0, count, _TOGETHER):
            some = range(begin, min(begin + _TOGETHER, count))
            made = list(_versions(template, first + 1, some, blobs))
            with database.writing() as connection:
                names = [name_of(number) for number in some]
                nbytes = made[0]["weights_bytes"] + made[0]["key_values_bytes"] + made[0]["manifest_bytes"]
                rows = [
                    {"id": version["adapter_id"], "tenant_id": owner, "name": name, "versions": 1, "bytes": nbytes}
                    for version, name in zip(made, names, strict=True)
                ]
                connection.execute(sa.insert(adapters), rows)
                connection.execute(sa.insert(versions), made)
                connection.execute(sa.insert(numbers), [{"tenant": BIG, "adapter": name, "last": 1} for name in names])
                noted = {"tenant_id": owner, "tenant": BIG, "actor": BIG, "key_id": "0", "action": "version.published"}
                details = [noted | {"target": f"{BIG}/{name}@1", "details": {}} for name in names]
                connection.execute(sa.insert(audit), details)
                total = {"adapters": tenants.c.adapters + len(made), "bytes": tenants.c.bytes + len(made) * nbytes}
                connection.execute(sa.update(tenants).where(tenants.c.id == owner).values(total))
    finally:
        database.close()


def name_of(number: int) -> str:
    """Returns the name of an adapter."""
    return f"adapter-{number:07}"


def _versions(template: dict[str, Any], first: int, some: range, blobs: Path) -> Iterator[dict[str, Any]]:
    del template["id"]
    for number in some:
        weights, key_values = (_blob(blobs, f"{number} {part}".encode() * 20) for part in ("weights", "key_values"))
        yield template | {
            "adapter_id": first + number,
            "number": 1,
            "digest": f"sha256:{hashlib.sha256(str(number).encode()).hexdigest()}",
            "weights": weights,
            "key_values": key_values,
        }
    template["id"] = 0


def _blob(blobs: Path, data: bytes) -> str:
    name = hashlib.sha256(data).hexdigest()
    path = blobs / name[:2] / name
    path.write_bytes(data)
    os.utime(path, (_LONG_AGO, _LONG_AGO))
    return f"sha256:{name}"
