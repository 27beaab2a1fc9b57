"""Clients in other languages, each with only its standard library, publish and fetch on both HTTP parsers."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from prefix_service.client import PrefixClient
from prefix_service.prefix.buffers import bytes_of
from prefix_service.prefix.safetensors_tensors import NAMES
from tests.api.helpers import adapter_of, expected_of, upload
from tests.client.counting_proxy import counting_proxy
from tests.conftest import Server, running_server
from tests.missing import not_tested

FOLDER: Final = Path(__file__).parent
TENANT: Final = "foreign"
MASK: Final = [[0, 1, 1], [1, 1, 1]]
"""The mask that every program posts."""
CONFIG: Final = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 64,
    "num_layers": 4,
    "num_attention_heads": 4,
    "token_dim": 256,
    "inference_mode": True,
}
CLIENTS: Final[dict[str, tuple[str, list[str], int]]] = {
    "java": ("java", [], 1),  # asks to upgrade every request to HTTP/2, as HttpClient does by default
    "go": ("go", [], 1),  # sends the upload in chunks, without a Content-Length
    "node": ("node", [], 2),  # fetch opens a second connection while the first one ends its request
    "curl": ("curl", [], 3),
    "curl --http2": ("curl", ["--http2"], 3),
    "curl that expects 100": ("curl", ["--header", "Expect: 100-continue"], 3),
}
"""Each client: its program, options for it, and the most connections that its three requests take."""
FIELDS: Final = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Program:
    """A client in another language, with options for it."""

    command: Sequence[str]
    options: Sequence[str] = ()
    connections: int = 3

    def run(self, url: str, key: str, adapter: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Publishes the folder, and fetches what was published."""
        environment = {**os.environ, "PREFIX_URL": url, "PREFIX_API_KEY": key, "LC_ALL": "C.UTF-8"}
        arguments = [*self.command, f"{TENANT}/{adapter}", str(folder), *self.options]
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=180)

    def output(self, url: str, key: str, adapter: str, folder: Path) -> dict[str, Any]:
        """Returns what the program prints, which must succeed."""
        done = self.run(url, key, adapter, folder)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def _needs(command: str, package: str) -> None:
    if shutil.which(command) is None:
        not_tested(f"{command} is missing: install {package}")


@pytest.fixture(scope="session")
def java(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the compiled Java program; `java Prefix.java` compiles it at every start."""
    _needs("javac", "openjdk-17-jdk-headless")
    folder = tmp_path_factory.mktemp("java")
    subprocess.run(["javac", "-Xlint:all", "-Werror", "-d", folder, FOLDER / "Prefix.java"], check=True)
    return ["java", "-XX:TieredStopAtLevel=1", "-cp", str(folder), "Prefix"]


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the compiled Go program."""
    _needs("go", "golang-go")
    folder = tmp_path_factory.mktemp("go")
    environment = {**os.environ, "GOCACHE": str(folder / "cache"), "GO111MODULE": "off"}
    build = ["go", "build", "-o", str(folder / "prefix"), str(FOLDER / "prefix.go")]
    subprocess.run(build, env=environment, check=True)
    return [str(folder / "prefix")]


@pytest.fixture(scope="session")
def node() -> list[str]:
    """Returns the Node.js program."""
    _needs("node", "nodejs")
    return ["node", str(FOLDER / "prefix.mjs")]


@pytest.fixture(scope="session")
def curl() -> list[str]:
    """Returns the shell script around curl."""
    _needs("curl", "curl")
    return ["bash", str(FOLDER / "prefix.sh")]


@pytest.fixture(params=CLIENTS)
def program(request: pytest.FixtureRequest) -> Program:
    """Returns each client in turn."""
    name, options, connections = CLIENTS[request.param]
    return Program(request.getfixturevalue(name), options, connections)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def hosting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yields a service with this parser, and the tenant of this module."""
    environment = {"PREFIX_HTTP_PARSER": request.param}
    with running_server(tmp_path_factory.mktemp(request.param) / "data", environment=environment) as running:
        running.client().put(f"/v1/tenants/{TENANT}")
        yield running


@pytest.fixture
def adapter() -> str:
    """Returns a name that no other test uses."""
    return uuid4().hex


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns an adapter of 0.5 MB, so that its upload arrives in many segments."""
    return _saved(tmp_path_factory.mktemp("adapter"), CONFIG, torch.randn(64, 4 * 2 * 256))


def _saved(folder: Path, config: Mapping[str, Any], flat: Tensor) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"prompt_embeddings": flat}, folder / "adapter_model.safetensors")
    return folder


def _assert_decoded(found: list[dict[str, Any]], expected: Mapping[str, Tensor]) -> None:
    """Checks names, dtypes, shapes and every bit of the tensors, and the first element as the language reads it."""
    decoded = {tensor.pop("name"): tensor for tensor in found}
    firsts = {name: tensor.pop("first") for name, tensor in decoded.items()}
    assert decoded == {
        name: {"dtype": NAMES[t.dtype], "shape": list(t.shape), "sha256": sha256(bytes_of(t.contiguous())).hexdigest()}
        for name, t in expected.items()
    }
    for name, tensor in expected.items():
        assert torch.tensor(firsts[name], dtype=tensor.dtype) == tensor.flatten()[0]


def _named(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f"past_key_values.{layer}.{part}": tensor
        for layer, pair in enumerate(pairs)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }


def test_an_upload_arrives_and_its_prefix_is_decoded(
    hosting: Server, program: Program, adapter: str, folder: Path
) -> None:
    """The service stores the file that was sent, the program decodes keys, values, mask and positions as `PrefixClient`
    does, and fetches on the connection of its upload.
    """
    with counting_proxy(hosting.url) as proxy:
        printed = program.output(proxy.url, hosting.admin_key, adapter, folder)
        assert proxy.connections <= program.connections
    assert printed["adapter"] == f"/v1/tenants/{TENANT}/adapters/{adapter}@1"
    stored = hosting.client().get(f"{printed['adapter']}/parameters").content
    assert stored == (folder / "adapter_model.safetensors").read_bytes()
    mask = torch.tensor(MASK)
    with PrefixClient(hosting.url, api_key=hosting.admin_key) as client:
        prefix = client.get(f"{TENANT}/{adapter}@1", batch_size=2)
        tensors = _named(prefix.past_key_values)
        _assert_decoded(printed["rows"], {**tensors, "attention_mask": prefix.attention_mask})
        extras = {"attention_mask": prefix.extend_mask(mask), "position_ids": prefix.position_ids(mask)}
        _assert_decoded(printed["masked"], {**tensors, **extras})


@pytest.mark.parametrize("hosting", ["h11"], indirect=True)
@pytest.mark.parametrize("language", ["java", "go", "node", "curl"])
def test_it_is_what_peft_computes(hosting: Server, request: pytest.FixtureRequest, language: str, adapter: str) -> None:
    """The program decodes what PEFT computes from a folder that PEFT saved."""
    program = Program(request.getfixturevalue(language))
    printed = program.output(hosting.url, hosting.admin_key, adapter, adapter_of("llama-n20-emb"))
    of_peft = {
        name.replace("b1.layers", "past_key_values"): tensor.repeat(2, 1, 1, 1)
        for name, tensor in expected_of("llama-n20-emb").items()
        if name.startswith("b1.layers")
    }
    _assert_decoded(printed["rows"], {**of_peft, "attention_mask": torch.ones(2, 20, dtype=torch.int64)})


@pytest.mark.parametrize("options", [[], ["--http2"], ["--header", "Expect: 100-continue"]], ids=str)
def test_curl_uses_its_connection_again(
    hosting: Server, curl: list[str], options: list[str], adapter: str, folder: Path, tmp_path: Path
) -> None:
    """curl's second request, after `--next`, opens no connection."""
    path = f"{hosting.url}/v1/tenants/{TENANT}/adapters/{adapter}"
    common = ["--silent", "--oauth2-bearer", hosting.admin_key, "--write-out", "%{http_code} %{num_connects}\n"]
    form = [argument for name in FIELDS for argument in ("--form", f"{name}=@{folder / name}")]
    first = [*common, *options, *form, "--output", str(tmp_path / "version.json"), f"{path}/versions"]
    second = [*common, "--output", str(tmp_path / "prefix.safetensors"), f"{path}@1/prefix"]
    done = subprocess.run(["curl", *first, "--next", *second], capture_output=True, text=True, timeout=180)
    assert done.stdout.splitlines() == ["201 1", "200 0"]


def test_a_wrong_key_is_reported_while_the_upload_is_sent(
    hosting: Server, program: Program, adapter: str, tmp_path: Path
) -> None:
    """The service answers 401 before it has read 16 MB, and the program reads and reports the answer."""
    folder = _saved(tmp_path, CONFIG, torch.zeros(1 << 22))
    done = program.run(hosting.url, "pfx_wrong", adapter, folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert _detail(upload(hosting.client("pfx_wrong"), TENANT, adapter), 401) in done.stderr


def test_a_refused_upload_is_reported(hosting: Server, program: Program, adapter: str, tmp_path: Path) -> None:
    """The program reports what the 422 says, whatever letters JSON escapes."""
    folder = _saved(tmp_path, {**CONFIG, "peft_type": 'a"b\\n…ü'}, torch.randn(64, 2048))
    done = program.run(hosting.url, hosting.admin_key, adapter, folder)
    assert (done.returncode, done.stdout) == (1, "")
    config, weights = ((folder / name).read_bytes() for name in FIELDS)
    detail = _detail(upload(hosting.client(), TENANT, adapter, config, weights), 422)
    assert "…ü" in detail
    assert detail in done.stderr
    assert hosting.client().get(f"/v1/tenants/{TENANT}/adapters/{adapter}").status_code == 404


def _detail(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status
    detail: str = answer.json()["detail"]
    assert detail
    return detail
