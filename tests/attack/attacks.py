"""The attacks: each with the smallest key that suffices, and what it may be answered."""

import asyncio
import gzip
import itertools
import json
import secrets
import struct
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

from tests.attack.wire import (
    Answers,
    Connection,
    Target,
    as_json,
    connected,
    form,
    head,
    once_each,
    repeatedly,
    request,
)

Key = Literal["none", "read", "write", "admin", "small"]
Run = Callable[[Target, Answers], Coroutine[None, None, None]]

TENANT: Final = "attacker"
SMALL_TENANT: Final = "small-attacker"
"""Has a small quota; the key `small` is one of scope `write` of this tenant."""
SMALL_QUOTA: Final = 2 << 20
_STORED: Final = (1 << 20) + 4096  # bytes of a version of `publish_and_delete`
QUOTA: Final = 1 << 30
"""Bytes that the attacker may have."""
ADAPTERS: Final = f"/v1/tenants/{TENANT}/adapters"
WIDE, LARGE, MANY = f"{ADAPTERS}/wide", f"{ADAPTERS}/large", f"{ADAPTERS}/many"
WIDE_TOKENS: Final = 16_384
VERSIONS: Final = 60
LARGE_LAYERS: Final = 32
HEAVY, HEAVY_VERSIONS = f"{ADAPTERS}/heavy", 20
"""Versions of the large one's shape, 32 MiB each."""
DEEP, DEEP_LAYERS = f"{ADAPTERS}/deep", 1000
_JSON: Final = (1 << 20) - 1000
"""Bytes of JSON that are just read; with a mask four times as many."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack. `allowed` lists the statuses that it may be answered with, beside a connection that is cut off. It
    may make so many bytes on the `disk`: twice its tenant's quota, and one version that was stored beside another
    before it was refused. Only one that `works` may take memory of the work budget; what others read is in the budgets
    of prefixes and renderings."""

    name: str
    key: Key
    says: str
    run: Run
    allowed: frozenset[int]
    disk: int
    works: bool


ATTACKS: dict[str, Attack] = {}


def attack(key: Key, *allowed: int, works: bool = True) -> Callable[[Run], Run]:
    """Adds a function to the attacks; its name and the first line of its docstring describe it."""

    def add(run: Run) -> Run:
        name = run.__name__.replace("_", "-")
        says = (run.__doc__ or "").partition("\n")[0]
        disk = 2 * (SMALL_QUOTA if key == "small" else QUOTA) + _STORED
        ATTACKS[name] = Attack(name, key, says, run, frozenset(allowed), disk, works)
        return run

    return add


# --- Authority ---


@attack("admin", 401)
async def revoked_in_the_body(target: Target, answers: Answers) -> None:
    """A key that is revoked while its body arrives mints an admin key."""
    body = as_json({"scope": "admin", "name": "minted"})
    for number in itertools.count():
        async with connected(target, answers) as first, connected(target, answers) as second:
            if first is None or second is None:
                return
            made = Answers()
            second.answers = made
            await second.send(request(target, "POST", f"/v1/tenants/{TENANT}/keys", "admin", body))
            created = await _json(second)
            if created is None:
                answers.count("cut off")
                return
            fields = {"Content_Type": "application/json", "Content_Length": str(len(body))}
            start = head(target, "POST", f"/v1/tenants/{TENANT}/keys", created["key"], **fields) + body[:5]
            await first.send(start)
            await asyncio.sleep(0.1)
            await second.send(request(target, "DELETE", f"/v1/tenants/{TENANT}/keys/{created['id']}", "admin"))
            await second.answer()
            await first.send(body[5:])
            await first.answer()
        if number >= target.seconds * 5:
            return


async def _json(connection: Connection) -> dict[str, Any] | None:
    """Returns the JSON of a created key; None for another answer."""
    got = await connection.reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in got.split(b"\r\n")[1:] if b":" in line)
    found: dict[str, Any] = json.loads(await connection.reader.readexactly(int(fields[b"content-length"])))
    return found if "key" in found else None


# --- Bodies ---


def _posting(path: str, key: str, body: Callable[[], bytes], connections: int, **fields: str) -> Run:
    async def run(target: Target, answers: Answers) -> None:
        whole = request(target, "POST", path, key, body(), **fields)

        async def step(connection: Connection) -> int | None:
            await connection.send(whole)
            return await connection.answer()

        await repeatedly(target, answers, connections, step)

    return run


async def _unread(target: Target, answers: Answers, connections: int, whole: bytes) -> None:
    """Send a request on each of so many connections, and read no more than the head of its answer."""

    async def step(connection: Connection) -> None:
        await connection.send(whole)
        await connection.status()

    await once_each(target, answers, connections, step)


def _lists(start: bytes, item: bytes, end: bytes, nbytes: int = _JSON) -> bytes:
    count = nbytes // (len(item) + 1)
    return start + (item + b",") * (count - 1) + item + end


@attack("read", 413, 422, 503, 507)
async def rows_of_nothing(target: Target, answers: Answers) -> None:
    """4 MiB of JSON with a mask: a million rows, each of them wrong."""
    await _posting("/v1/prefixes", "read", lambda: _lists(b'{"rows":[', b"[]", b"]}", 4 * _JSON), 2)(target, answers)


@attack("read", 413, 422, 503, 507)
async def rows_of_lists(target: Target, answers: Answers) -> None:
    """2 MB of JSON: 65,536 rows, each a sound list of prefixes."""
    rows = as_json({"rows": [["a/b"] * 4] * 65_536})
    await _posting("/v1/prefixes", "read", lambda: rows, 2)(target, answers)


@attack("read", 413, 422, 503, 507)
async def many_names(target: Target, answers: Answers) -> None:
    """4 MiB of JSON: 400,000 names of members, none of which is known."""
    members = b",".join(b'"%d":0' % number for number in range(400_000))
    await _posting(f"{LARGE}/prefix", "read", lambda: b"{" + members + b"}", 4)(target, answers)


@attack("write", 200, 201, 413, 422, 503, 507)
async def config_of_nothing(target: Target, answers: Answers) -> None:
    """Uploads behind a base model's config of a megabyte of lists."""
    lists = _lists(b'{"a":[', b"[]", b"]}")
    config = as_json(_config(num_virtual_tokens=1, token_dim=2))
    file = _hidden_upload(1, 1, 1)
    parts = {"adapter_config.json": config, "base_model_config": lists, "adapter_model.safetensors": file}
    body, kind = form(parts)
    path = f"{ADAPTERS}/lists/versions"
    await _posting(path, "write", lambda: body, 4, Content_Type=kind)(target, answers)


@attack("read", 400, 413, 503, 507)
async def outputs_of_nothing(target: Target, answers: Answers) -> None:
    """A megabyte of JSON: outputs, each of them wrong."""
    path = f"/v2/models/{TENANT}/large/infer"
    await _posting(path, "read", lambda: _lists(b'{"inputs":[],"outputs":[', b"{}", b"]}"), 2)(target, answers)


@attack("read", 400, 413, 503, 507)
async def gzip_bomb(target: Target, answers: Answers) -> None:
    """18 KB of gzip that unpack to 18 MB of JSON."""
    path = f"/v2/models/{TENANT}/large/infer"
    body = gzip.compress(_lists(b'{"inputs":[', b"[]", b"]}", 18 << 20))
    await _posting(path, "read", lambda: body, 2, Content_Encoding="gzip")(target, answers)


@attack("read", 413, 422, 503, 507)
async def nested_json(target: Target, answers: Answers) -> None:
    """JSON that nests a million levels deep."""
    await _posting(f"{LARGE}/prefix", "read", lambda: b'{"layers":' + b"[" * 1_000_000, 2)(target, answers)


@attack("read", 200, 413, 503, 507)
async def json_masks(target: Target, answers: Answers) -> None:
    """Masks of 256 rows of 4,000 tokens as JSON, eight at a time; nobody reads the answers."""
    row = [1] * 4000
    whole = request(target, "POST", f"{LARGE}/prefix", "read", as_json({"attention_mask": [row] * 256}))
    await _unread(target, answers, 8, whole)


@attack("read", 200, 413, 503, 507)
async def binary_masks(target: Target, answers: Answers) -> None:
    """Masks of 256 rows of 16,384 tokens in 4 MiB each, 24 at a time; nobody reads the answers."""
    data = b"\1" * (256 * WIDE_TOKENS)
    text = as_json({"attention_mask": {"dtype": "BOOL", "shape": [256, WIDE_TOKENS], "data_offsets": [0, len(data)]}})
    body = struct.pack("<Q", len(text)) + text + data
    fields = {"Content_Type": "application/vnd.safetensors"}
    whole = request(target, "POST", f"{WIDE}/prefix?mask_dtype=int64", "read", body, **fields)
    await _unread(target, answers, 24, whole)


@attack("read", 413, 422, 503, 507)
async def tiny_chunks(target: Target, answers: Answers) -> None:
    """Bodies in chunks of one byte, as fast as the service takes them."""
    fields = {"Content_Type": "application/json", "Transfer_Encoding": "chunked"}
    start, piece = head(target, "POST", f"{LARGE}/prefix", "read", **fields), b"1\r\n \r\n" * 10_000

    async def step(connection: Connection) -> int | None:
        await connection.send(start, *[piece] * 200, b"0\r\n\r\n")
        return await connection.answer()

    await repeatedly(target, answers, 4, step)


@attack("none", 401)
async def bodies_without_a_key(target: Target, answers: Answers) -> None:
    """Uploads of gigabytes without a key, as fast as the service takes them."""
    start = head(target, "POST", f"{ADAPTERS}/x/versions", None, Content_Type="a/b", Content_Length=str(1 << 40))

    async def step(connection: Connection) -> int | None:
        sending = asyncio.create_task(connection.send(start, *[bytes(1 << 16)] * 160))
        try:
            return await connection.answer()
        finally:
            sending.cancel()

    await repeatedly(target, answers, 8, step)


# --- Publishing ---


def _config(**values: object) -> dict[str, object]:
    given = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "m", "num_layers": 1}
    return {**given, "num_attention_heads": 1, "inference_mode": True, **values}


@cache
def _hidden_upload(tokens: int = WIDE_TOKENS, hidden: int = 2 * WIDE_TOKENS, width: int = 2) -> bytes:
    """Half a megabyte of weights whose hidden activations take gigabytes."""
    shapes = {
        "embedding.weight": [tokens, width],
        "transform.0.weight": [hidden, width],
        "transform.0.bias": [hidden],
        "transform.2.weight": [2 * width, hidden],
        "transform.2.bias": [2 * width],
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * (shape[0] * (shape[1] if len(shape) > 1 else 1))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + bytes(at)


@attack("write", 200, 201, 413, 422, 503, 507)
async def hidden_activations(target: Target, answers: Answers) -> None:
    """Half a megabyte of weights whose projection takes gigabytes of hidden activations."""
    config = _config(
        num_virtual_tokens=WIDE_TOKENS,
        token_dim=2,
        prefix_projection=True,
        inference_mode=False,
        encoder_hidden_size=2 * WIDE_TOKENS,
    )
    numbers = itertools.count()

    async def step(connection: Connection) -> int | None:
        text = as_json({**config, "base_model_name_or_path": f"m{next(numbers)}"})
        body, kind = form({"adapter_config.json": text, "adapter_model.safetensors": _hidden_upload()})
        await connection.send(request(target, "POST", f"{ADAPTERS}/hidden/versions", "write", body, Content_Type=kind))
        return await connection.answer()

    await repeatedly(target, answers, 4, step)


@attack("write", 200, 201, 413, 503, 507)
async def large_uploads(target: Target, answers: Answers) -> None:
    """Five uploads of 48 MiB at a time."""
    tokens, width = 1024, 6144
    data = 2 * tokens * width * 4
    header = as_json({"prompt_embeddings": {"dtype": "F32", "shape": [tokens, 2 * width], "data_offsets": [0, data]}})
    numbers = itertools.count()

    async def step(connection: Connection) -> int | None:
        text = as_json(_config(num_virtual_tokens=tokens, token_dim=width, num_attention_heads=48))
        file = struct.pack("<Q", len(header)) + header + struct.pack("<Q", next(numbers)) + bytes(data - 8)
        body, kind = form({"adapter_config.json": text, "adapter_model.safetensors": file})
        await connection.send(request(target, "POST", f"{ADAPTERS}/uploads/versions", "write", body, Content_Type=kind))
        return await connection.answer()

    await repeatedly(target, answers, 5, step)


@attack("write", 413, 422, 429, 503, 507)
async def untrained(target: Target, answers: Answers) -> None:
    """Untrained versions of 1 GiB, whose weights take as much, of a tenant that may have 1 GiB in all."""
    config = _config(num_virtual_tokens=WIDE_TOKENS, num_layers=128, token_dim=64)
    body = as_json({"config": config, "init_weights": "random", "seed": 1})
    await _posting(f"{ADAPTERS}/untrained/versions", "write", lambda: body, 4)(target, answers)


@attack("small", 201, 204, 503, 507)
async def publish_and_delete(target: Target, answers: Answers) -> None:
    """Untrained versions of a megabyte, each deleted as soon as it exists."""
    config = _config(num_virtual_tokens=1024, token_dim=64)
    body = as_json({"config": config, "init_weights": "random"})
    numbers = itertools.count()

    async def step(connection: Connection) -> int | None:
        path = f"/v1/tenants/{SMALL_TENANT}/adapters/a{next(numbers)}"
        fresh = body[:-1] + b',"seed":%d}' % secrets.randbelow(1 << 60)
        await connection.send(request(target, "POST", f"{path}/versions", "small", fresh))
        if await connection.answer() == 201:
            await connection.send(request(target, "DELETE", path, "small"))
            return await connection.answer()
        return None if connection.reader.at_eof() else 507

    await repeatedly(target, answers, 2, step)


@attack("write", 413, 422, 503, 507)
async def over_the_quota(target: Target, answers: Answers) -> None:
    """Uploads that declare a gigabyte, of a tenant that may have so much in all and has something already."""
    fields = {"Content_Type": "multipart/form-data; boundary=attack", "Content_Length": str(1 << 30)}
    start = head(target, "POST", f"{ADAPTERS}/quota/versions", "write", **fields)

    async def step(connection: Connection) -> int | None:
        sending = asyncio.create_task(connection.send(start, *[bytes(1 << 16)] * 1000))
        try:
            return await connection.answer()
        finally:
            sending.cancel()

    await repeatedly(target, answers, 4, step)


@attack("write", 413, 422, 503, 507)
async def long_names(target: Target, answers: Answers) -> None:
    """Configs whose base model has a name of a megabyte."""
    config = _config(num_virtual_tokens=1, token_dim=2, base_model_name_or_path="m" * 1_000_000)
    body = as_json({"config": config, "init_weights": "zero", "seed": 1})
    await _posting(f"{ADAPTERS}/names/versions", "write", lambda: body, 4)(target, answers)


# --- Reading ---


@attack("read", 200, 503, 507)
async def unread_masks(target: Target, answers: Answers) -> None:
    """24 requests for 256 rows of 16,384 tokens; nobody reads the answers."""
    whole = request(target, "GET", f"{WIDE}/prefix?batch_size=256", "read")
    await _unread(target, answers, 24, whole)


@attack("read", 200, 503)
async def digests_of_rows(target: Target, answers: Answers) -> None:
    """HEAD for the digests of 256 rows of a large adapter, 50 at a time."""
    numbers = itertools.count()

    async def step(connection: Connection) -> tuple[int, int] | None:
        layers = f"0:{next(numbers) % LARGE_LAYERS + 1}"
        query = f"batch_size=256&layers={layers}&layout={'layers' if next(numbers) % 2 else 'stacked'}"
        await connection.send(request(target, "HEAD", f"{LARGE}/prefix?{query}", "read", Want_Repr_Digest="sha-256=10"))
        return await connection.status()

    await repeatedly(target, answers, 50, step)


@attack("read", 200, 503, 507)
async def slow_readers(target: Target, answers: Answers) -> None:
    """32 readers of other ranges of layers, each at 75 kB a second."""
    numbers = itertools.count()

    async def step(connection: Connection) -> None:
        first = next(numbers) % LARGE_LAYERS
        query = f"layers={first}:{LARGE_LAYERS}&batch_size=256"
        await connection.send(request(target, "GET", f"{LARGE}/prefix?{query}", "read"))
        await connection.status()
        while await connection.reader.read(7500):  # noqa: ASYNC110 - the pace, not a wait for something
            await asyncio.sleep(0.1)

    await once_each(target, answers, 32, step)


@attack("read", 200, 422, 429, 431, 503)
async def long_questions(target: Target, answers: Answers) -> None:
    """Reads with 32 KiB of `Accept`, each another."""

    async def step(connection: Connection) -> tuple[int, int] | None:
        accept = "*/*;a=" + secrets.token_hex(16 << 10)
        await connection.send(request(target, "HEAD", f"{LARGE}/prefix", "read", Accept=accept))
        return await connection.status()

    await repeatedly(target, answers, 8, step)


@attack("read", 200, 503)
async def listings(target: Target, answers: Answers) -> None:
    """Six at a time list the versions of an adapter, and every version in the index."""
    paths = itertools.cycle((("GET", f"{MANY}/versions"), ("GET", ADAPTERS), ("POST", "/v2/repository/index")))

    async def step(connection: Connection) -> int | None:
        method, path = next(paths)
        await connection.send(request(target, method, path, "read"))
        status = await connection.answer()
        return None if path.startswith("/v2") else status  # the index has no length

    await repeatedly(target, answers, 6, step)


@attack("read", 200, 503)
async def cold_scan(target: Target, answers: Answers) -> None:
    """Eight at a time read versions that are not in memory."""
    numbers = itertools.count(1)

    async def step(connection: Connection) -> int | None:
        await connection.send(request(target, "GET", f"{MANY}@{next(numbers) % VERSIONS + 1}/prefix", "read"))
        return await connection.answer()

    await repeatedly(target, answers, 8, step)


@attack("read", 200, 503, works=False)
async def one_layer_of_each(target: Target, answers: Answers) -> None:
    """One layer of each of 20 versions of 32 MiB, three times, so that a thirty-second of each stays in memory."""
    numbers = itertools.count()

    async def step(connection: Connection) -> int | None:
        layer, version = divmod(next(numbers), HEAVY_VERSIONS)
        query = f"layers={layer % LARGE_LAYERS}:{layer % LARGE_LAYERS + 1}"
        whole = request(target, "GET", f"{HEAVY}@{version + 1}/prefix?{query}", "read")
        await connection.send(whole * 3)
        return [await connection.answer() for _ in range(3)][-1]

    async with connected(target, answers) as connection:
        for _ in range(HEAVY_VERSIONS):  # each once, however short the attack is
            if connection is None or await step(connection) is None:
                return
    await repeatedly(target, answers, 8, step)


@attack("read", 200, 503, works=False)
async def float8_of_changing_layers(target: Target, answers: Answers) -> None:
    """HEAD for the digests of other ranges of layers of a large adapter in float8, 50 at a time."""
    ranges = itertools.combinations(range(LARGE_LAYERS + 1), 2)
    queries = itertools.cycle(sorted(ranges, key=lambda layers: layers[0] - layers[1]))  # the longest first

    async def step(connection: Connection) -> tuple[int, int] | None:
        first, last = next(queries)
        query = f"dtype=float8_e4m3fn&layers={first}:{last}"
        await connection.send(request(target, "HEAD", f"{LARGE}/prefix?{query}", "read"))
        return await connection.status()

    await repeatedly(target, answers, 50, step)


@attack("read", 200, 503)
async def pipelined(target: Target, answers: Answers) -> None:
    """10,000 requests on each of 16 connections, whose answers nobody reads."""
    whole = request(target, "GET", f"{LARGE}/prefix", "read") * 10_000
    await _unread(target, answers, 16, whole)


@attack("read", 408, 503)
async def half_bodies(target: Target, answers: Answers) -> None:
    """800 requests whose bodies do not go on."""
    fields = {"Content_Type": "application/json", "Content_Length": "1000"}
    start = head(target, "POST", f"{LARGE}/prefix", "read", **fields) + b"{"

    async def step(connection: Connection) -> None:
        await connection.send(start)
        await connection.answer()

    await once_each(target, answers, 800, step)


@attack("read", 206, 503)
async def bytes_of_weights(target: Target, answers: Answers) -> None:
    """One byte of a large version's weights file, which is verified each time, 16 at a time."""

    async def step(connection: Connection) -> int | None:
        await connection.send(request(target, "GET", f"{LARGE}/parameters", "read", Range="bytes=0-0"))
        return await connection.answer()

    await repeatedly(target, answers, 16, step)


@attack("write", 200, 201, 413, 422, 503, 507)
async def long_computations(target: Target, answers: Answers) -> None:
    """Untrained versions whose projection takes minutes of a processor."""
    config = _config(num_virtual_tokens=WIDE_TOKENS, num_layers=2, num_attention_heads=8, token_dim=512)
    config |= {"prefix_projection": True, "inference_mode": False, "encoder_hidden_size": 4096}
    body = as_json({"config": config, "init_weights": "random", "seed": 1})
    await _posting(f"{ADAPTERS}/long/versions", "write", lambda: body, 4)(target, answers)


@attack("read", 200, 503)
async def plans_of_many_layers(target: Target, answers: Answers) -> None:
    """HEAD for an adapter of 1,000 layers in a form that nobody asked for before, 200 at a time."""
    numbers = itertools.count()

    async def step(connection: Connection) -> tuple[int, int] | None:
        layers, rows = divmod(next(numbers), 255)
        query = f"dtype=float8_e4m3fn&batch_size={rows + 2}&layers=0:{DEEP_LAYERS - layers}"
        await connection.send(request(target, "HEAD", f"{DEEP}/prefix?{query}", "read"))
        return await connection.status()

    await repeatedly(target, answers, 200, step)


@attack("read", 200, 503)
async def models_of_many_layers(target: Target, answers: Answers) -> None:
    """Metadata and configuration of a model of 1,000 layers, 200 at a time."""
    paths = itertools.cycle((f"/v2/models/{TENANT}/deep/config", f"/v2/models/{TENANT}/deep"))

    async def step(connection: Connection) -> int | None:
        await connection.send(request(target, "GET", next(paths), "read"))
        return await connection.answer()

    await repeatedly(target, answers, 200, step)


# --- Writing ---


@attack("write", 204, 413, 503, 507)
async def other_cards(target: Target, answers: Answers) -> None:
    """Cards of 256 KiB, each another than before, on 64 connections."""
    numbers = itertools.count()
    cards = [letter * (256 << 10) for letter in (b"a", b"b", b"c")]

    async def step(connection: Connection) -> int | None:
        card = cards[next(numbers) % len(cards)]
        whole = request(target, "PUT", f"{LARGE}/card", "write", card, Content_Type="text/markdown")
        await connection.send(whole)
        return await connection.answer()

    await repeatedly(target, answers, 64, step)


# --- Without a key ---


@attack("none", 200, 503)
async def unread_documents(target: Target, answers: Answers) -> None:
    """600 connections that ask for the public document six times each, and do not read."""
    await _unread(target, answers, 600, request(target, "GET", "/openapi.json", None) * 6)


@attack("none", 408, 503)
async def idle_connections(target: Target, answers: Answers) -> None:
    """1,500 connections that say nothing."""
    await once_each(target, answers, 1500, lambda connection: connection.answer())


@attack("none", 408, 431, 503)
async def slow_heads(target: Target, answers: Answers) -> None:
    """600 heads of 60 KiB that stop before their end."""
    start = head(target, "GET", "/livez", None, A="a" * 60_000)[:-2]

    async def step(connection: Connection) -> None:
        await connection.send(start)
        await connection.answer()

    await once_each(target, answers, 600, step)


@attack("none", 401, 429, 503)
async def wrong_keys(target: Target, answers: Answers) -> None:
    """Well-formed keys that do not exist, as fast as the service answers."""

    async def step(connection: Connection) -> int | None:
        body = f"pfx_{secrets.token_hex(8)}_{secrets.token_hex(24)}"
        key = f"{body}_{zlib.crc32(body.encode()):08x}"
        await connection.send(request(target, "GET", f"{LARGE}/prefix", key))
        return await connection.answer()

    await repeatedly(target, answers, 16, step)
