"""Starts Debian's docker-registry, an OCI registry, for the tests."""

import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Final

from tests.missing import not_tested

USER: Final = "the-tests"
PASSWORD: Final = "their-secret"  # noqa: S105 - of a registry that lives as long as the tests
_HTPASSWD: Final = f"{USER}:$2b$04$18R9CMjuFai/hjocaMh1rOK6gymbWJY9BAchEvi4kvY9l1uUxQsXS\n"


class DockerRegistry:
    """A registry in a temporary folder, which wants a user and a password."""

    def __init__(self, port: int) -> None:
        program = shutil.which("docker-registry")
        if program is None:
            not_tested("an OCI registry, because Debian's docker-registry is not installed")
        self.place = f"127.0.0.1:{port}"
        self._folder = Path(tempfile.mkdtemp(prefix="prefix-registry-"))
        (self._folder / "htpasswd").write_text(_HTPASSWD)
        settings = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self._folder / "blobs")}},
            "http": {"addr": self.place},
            "auth": {"htpasswd": {"realm": "tests", "path": str(self._folder / "htpasswd")}},
        }
        (self._folder / "config.yml").write_text(json.dumps(settings))
        # The server ends with these tests, even if they are killed.
        command = ["setpriv", "--pdeathsig=KILL", program, "serve", str(self._folder / "config.yml")]
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"docker-registry did not start:\n{(self._folder / 'log').read_text()[-3000:]}")
            time.sleep(0.05)

    def login(self, home: Path) -> dict[str, str]:
        """Writes what `docker login` writes to a home folder; returns the variable that leads to it."""
        (home / ".docker").mkdir()
        known = {self.place: {"auth": b64encode(f"{USER}:{PASSWORD}".encode()).decode()}}
        (home / ".docker" / "config.json").write_text(json.dumps({"auths": known}))
        return {"HOME": str(home)}

    def remove(self) -> None:
        """Kills the server, and removes its folder."""
        self._process.kill()
        self._process.wait(30)
        shutil.rmtree(self._folder)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.place}/v2/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
