"""Starts engines and servers of vLLM, in processes of .venv-vllm's Python."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import httpx

from tests.conftest import free_port

ROOT: Final = Path(__file__).parents[2]
PYTHON: Final = ROOT / os.environ.get("VLLM_ENVIRONMENT", ".venv-vllm") / "bin" / "python"
OLDEST: Final = ROOT / ".venv-vllm-oldest" / "bin" / "python"
"""That of the oldest version that is supported."""
PYTHONS: Final = {"vLLM": PYTHON} if "VLLM_ENVIRONMENT" in os.environ else {"vLLM": PYTHON, "oldest vLLM": OLDEST}
"""Those on which a gate runs tests, by their names there."""
_FORKS: Final = "VLLM_ON_GPU" not in os.environ
"""Whether programs are forked from a process that has imported vLLM: CUDA cannot be used in such a fork."""
_ENVIRONMENT: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def transfer_config(url: str, **extra: Any) -> dict[str, Any]:
    """Returns `kv_transfer_config` as README gives it."""
    return {
        "kv_connector": "PrefixConnector",
        "kv_connector_module_path": "prefix_service.client.vllm",
        "kv_role": "kv_consumer",
        "kv_connector_extra_config": {"url": url, **extra},
    }


def multi_config(*connectors: dict[str, Any], ours: bool = True, **more: Any) -> dict[str, Any]:
    """Returns `kv_transfer_config` of several connectors, as README gives it, or with vLLM's own MultiConnector."""
    module = {"kv_connector_module_path": "prefix_service.client.vllm"} if ours else {}
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(connectors)},
        **module,
        **more,
    }


def store_config(folder: Path) -> dict[str, Any]:
    """Returns the config of vLLM's ExampleConnector, which keeps what it saves in a folder, by token ids alone."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def _environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    return {**inherited, **_ENVIRONMENT, **more}


class _Starter:
    """The process that forks programs of one vLLM, one for all that compute with so many threads."""

    def __init__(self, python: Path, threads: int) -> None:
        command = [str(python), str(Path(__file__).with_name("starter.py"))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=_environment(OMP_NUM_THREADS=str(threads)), **pipes)
        atexit.register(self._process.communicate)

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@functools.cache
def _starter(python: Path, threads: int) -> _Starter:
    return _Starter(python, threads)


class _Program:
    """A program of vLLM, with the part of `subprocess.Popen` that is needed here."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def poll(self) -> int | None:
        """Returns the exit status; None if the program has not ended."""
        return self.wait(0)

    def wait(self, timeout: float) -> int | None:
        """Waits for the program's end for so many seconds; returns its exit status, or None if it has not ended."""
        raise NotImplementedError

    def end(self) -> None:
        """Asks the program to end, and waits; kills it if it does not.

        Raises:
            RuntimeError: it had to be killed.
        """
        if self.poll() is None:
            os.kill(self._pid, signal.SIGTERM)
        if self.wait(90) is None:
            os.kill(self._pid, signal.SIGKILL)
            raise RuntimeError("vLLM did not end within 90 seconds")


class _Forked(_Program):
    """A program that is forked from a process that has imported vLLM."""

    def __init__(self, python: Path, threads: int, what: dict[str, Any]) -> None:
        self._starter = _starter(python, threads)
        super().__init__(self._starter.ask({"start": what})["pid"])

    def wait(self, timeout: float) -> int | None:
        """Waits as `_Program` says."""
        status: int | None = self._starter.ask({"wait": self._pid, "seconds": timeout})["status"]
        return status


class _Spawned(_Program):
    """A program that imports vLLM itself."""

    def __init__(self, python: Path, what: dict[str, Any]) -> None:
        named = ["-m", what["module"]] if "module" in what else [what["path"]]
        with Path(what["log"]).open("ab") as log:
            command = [str(python.absolute()), *named, *what["arguments"]]
            places: dict[str, Any] = {"cwd": what["folder"], "stdout": log, "stderr": log}
            self._process = subprocess.Popen(command, env=what["environment"], **places)
        super().__init__(self._process.pid)

    def wait(self, timeout: float) -> int | None:
        """Waits as `_Program` says."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


def _program(python: Path, threads: int = 1, **what: Any) -> _Program:
    return _Forked(python, threads, what) if _FORKS else _Spawned(python, what)


class Engine:
    """An `LLM()` in a process of its own."""

    def __init__(self, questions: IO[str], answers: IO[str], log: Path) -> None:
        self._questions, self._answers, self._log = questions, answers, log

    def run(self, jobs: Sequence[dict[str, Any]], max_tokens: int = 24) -> dict[str, Any]:
        """Generates all jobs in one batch."""
        answer: dict[str, Any] = self.ask({"jobs": list(jobs), "max_tokens": max_tokens})
        return answer

    def begin(self, jobs: Sequence[dict[str, Any]], max_tokens: int = 24) -> None:
        """Begins to generate all jobs in one batch; `answer` returns the result."""
        self._say({"jobs": list(jobs), "max_tokens": max_tokens})

    def ask(self, what: dict[str, Any]) -> Any:
        """Sends a request, and waits for the answer."""
        self._say(what)
        return self.answer()

    def answer(self) -> Any:
        """Returns the next answer."""
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"vLLM ended:\n{self.log()[-4000:]}")
        return json.loads(line)

    def log(self) -> str:
        """Returns what the process has printed."""
        return self._log.read_text()

    def _say(self, what: dict[str, Any]) -> None:
        self._questions.write(json.dumps(what) + "\n")
        self._questions.flush()


@contextmanager
def engine(
    folder: Path,
    model: Path,
    transfer: dict[str, Any],
    key: str,
    *,
    python: Path = PYTHON,
    threads: int = 1,
    **options: Any,
) -> Iterator[Engine]:
    """Yields an engine of this Python's vLLM for a model folder, without a tokenizer, once it is ready."""
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
    log = folder / "vllm.log"
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address := f"{short}/engine")
        listener.listen()
        listener.settimeout(300)
        program = _program(
            python,
            threads,
            path=str(Path(__file__).with_name("engine.py")),
            arguments=[address],
            environment=_environment(
                PREFIX_API_KEY=key, VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS=str(threads)
            ),
            folder=str(folder),
            log=str(log),
        )
        try:
            connection, _ = listener.accept()
            with connection, connection.makefile("w") as questions, connection.makefile() as answers:
                made = Engine(questions, answers, log)
                made.ask({"engine": arguments})
                yield made
        finally:
            program.wait(60)
            program.end()


@contextmanager
def openai_server(
    folder: Path, model: Path, transfer: dict[str, Any], key: str, *options: str
) -> Iterator[httpx.Client]:
    """Yields a client of vLLM's OpenAI-compatible server for a model folder, once it is ready."""
    folder.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), folder / "vllm.log"
    arguments = ["--model", str(model), "--port", str(port)]
    arguments += ["--host", "127.0.0.1", "--served-model-name", "model", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "2048", "--kv-transfer-config", json.dumps(transfer), *options]
    program = _program(
        PYTHON,
        module="vllm.entrypoints.openai.api_server",
        arguments=arguments,
        environment=_environment(PREFIX_API_KEY=key),
        folder=str(folder),
        log=str(log),
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            _wait(client, program, log)
            yield client
    finally:
        program.end()


def _wait(client: httpx.Client, program: _Program, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and program.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")
