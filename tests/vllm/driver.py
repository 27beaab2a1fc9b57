"""Engines and servers of vLLM, in processes of .venv-vllm's Python."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import httpx

from tests.conftest import free_port

ROOT: Final = Path(__file__).parents[2]
PYTHON: Final = ROOT / os.environ.get("VLLM_ENVIRONMENT", ".venv-vllm") / "bin" / "python"
_ENVIRONMENT: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def transfer_config(url: str, **extra: Any) -> dict[str, Any]:
    """`kv_transfer_config` as README gives it."""
    return {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefix_service.client.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"url": url, **extra},
    }


def multi_config(*connectors: dict[str, Any], ours: bool = True, **more: Any) -> dict[str, Any]:
    """`kv_transfer_config` of several connectors, as README gives it, or with vLLM's own MultiConnector."""
    module = {"kv_connector_module_path": "prefix_service.client.vllm"} if ours else {}
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(connectors)},
        **module,
        **more,
    }


def store_config(folder: Path) -> dict[str, Any]:
    """vLLM's ExampleConnector, which keeps what it saves in a folder, by token ids alone."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def _environment(key: str, more: dict[str, str] | None = None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    return {**inherited, **_ENVIRONMENT, "PREFIX_API_KEY": key, **(more or {})}


class Engine:
    """One `LLM()` in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", answers: IO[str], log: Path) -> None:
        self._process, self._answers, self._log = process, answers, log

    def run(self, jobs: Sequence[dict[str, Any]], max_tokens: int = 24) -> dict[str, Any]:
        """Generate all jobs in one batch."""
        answer: dict[str, Any] = self.ask({"jobs": list(jobs), "max_tokens": max_tokens})
        return answer

    def begin(self, jobs: Sequence[dict[str, Any]], max_tokens: int = 24) -> None:
        """The same without waiting: `answer` gives it."""
        self._say({"jobs": list(jobs), "max_tokens": max_tokens})

    def ask(self, what: dict[str, Any]) -> Any:
        """Say something, and wait for the answer."""
        self._say(what)
        return self.answer()

    def answer(self) -> Any:
        """What comes next."""
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"vLLM ended:\n{self.log()[-4000:]}")
        return json.loads(line)

    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def _say(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()


@contextmanager
def engine(
    folder: Path, model: Path, transfer: dict[str, Any], key: str, *, threads: int = 1, **options: Any
) -> Iterator[Engine]:
    """An engine for a model folder, without a tokenizer, ready when the block begins."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "seed": 0,
        "disable_log_stats": False,
        "block_size": 32,
        "kv_transfer_config": transfer,
        **options,
    }
    reader, writer = os.pipe()
    log = folder / "vllm.log"
    command = [str(PYTHON), str(Path(__file__).with_name("engine.py")), str(writer)]
    with log.open("w") as output, os.fdopen(reader) as answers:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            text=True,
            pass_fds=[writer],
            cwd=folder,
            env=_environment(key, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}),
        )
        os.close(writer)
        try:
            made = Engine(process, answers, log)
            made.ask({"engine": arguments})
            yield made
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=90)


@contextmanager
def openai_server(
    folder: Path, model: Path, transfer: dict[str, Any], key: str, *options: str
) -> Iterator[httpx.Client]:
    """vLLM's OpenAI-compatible server for a model folder, ready when the block begins."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "vllm.log"
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "model", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "2048", "--kv-transfer-config", json.dumps(transfer), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=_environment(key))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            _wait(client, process, log)
            yield client
    finally:
        process.terminate()
        process.wait(timeout=90)


def _wait(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")
