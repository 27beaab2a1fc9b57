"""Forks programs of vLLM from a process that has imported it, so that a start costs no seconds of imports.

.venv-vllm's Python runs it, so it imports nothing of the tests. The processes that a program starts are forked from the
same process: vLLM spawns an engine and its workers, each of which would import for seconds.

Reads from stdin a line of JSON each, and answers with one:

- `{"start": {"module": … or "path": …, "arguments": […], "environment": {…}, "folder": …, "log": …}}`: `{"pid": …}`
- `{"wait": pid, "seconds": …}`: `{"status": …}`, null if the program has not ended within so many seconds
"""

import importlib
import json
import multiprocessing
import os
import runpy
import sys
from multiprocessing import context, forkserver, resource_tracker
from pathlib import Path
from typing import Any


class _Process(context.ForkServerProcess):
    """A process that begins with the environment, the folder and the log of the one that starts it, as a spawned one
    does.
    """

    def start(self) -> None:
        """Starts it."""
        self._begin = (dict(os.environ), str(Path.cwd()), str(Path("/proc/self/fd/1").readlink()))
        super().start()

    def run(self) -> None:
        """Runs its target."""
        _begin(*self._begin)
        super().run()


class _Forking(context.ForkServerContext):
    Process = _Process


_find_context = multiprocessing.get_context
_patched: Any = multiprocessing
_patched.get_context = lambda method=None: _Forking() if method == "spawn" else _find_context(method)
_server: Any = forkserver._forkserver
if _server._forkserver_address:  # this process was forked: it uses the server that forked it, and starts none
    _server.ensure_running = resource_tracker.ensure_running


def _begin(environment: dict[str, str], folder: str, log: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(output, number)


def main() -> None:
    """Answers lines until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some versions of vLLM print warnings when they are imported, which are no answers
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["vllm.entrypoints.openai.api_server", "vllm.v1.worker.cpu_worker"])
    programs: dict[int | None, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            program = forking.Process(target=run, args=(asked["start"],))
            program.start()
            programs[program.pid] = program
            answer = {"pid": program.pid}
        else:
            programs[asked["wait"]].join(asked["seconds"])
            answer = {"status": programs[asked["wait"]].exitcode}
        print(json.dumps(answer), file=answers, flush=True)


def run(asked: dict[str, Any]) -> None:
    """Runs one program in this process."""
    _begin(asked["environment"], asked["folder"], asked["log"])
    sys.argv = [asked.get("module") or asked["path"], *asked["arguments"]]
    if "module" in asked:
        runpy.run_module(asked["module"], run_name="__main__")
    else:
        runpy.run_path(asked["path"], run_name="__main__")


if __name__ == "__main__":
    importlib.import_module(Path(__file__).stem).main()  # under the name by which forked processes import it
