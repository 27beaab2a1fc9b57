"""`service.api.run`: how worker processes come to life."""

import subprocess
import sys
from pathlib import Path

_START = """
import pickle, sys
from pathlib import Path
import uvicorn
from service.api import run
from service.settings import Settings

handed = {}
uvicorn.run = lambda app, **options: handed.update(app=app, **options)
run.run(Settings(data_dir=Path(sys.argv[1]) / "data", workers=2))
Path(sys.argv[1], "handed").write_bytes(pickle.dumps(uvicorn.Config(**handed)))
"""
_TAKE = """
import pickle, sys
from pathlib import Path
from uvicorn.importer import import_from_string

config = pickle.loads(Path(sys.argv[1], "handed").read_bytes())
print("torch" in sys.modules)
print(import_from_string(config.http).__name__)
"""


def _python(code: str, *arguments: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return done.stdout


def test_a_worker_answers_its_supervisor_before_it_imports_torch(tmp_path: Path) -> None:
    """uvicorn kills a worker that is silent for long, and begins anew: on a slow disk none would ever serve."""
    _python(_START, tmp_path)
    assert _python(_TAKE, tmp_path).split() == ["False", "connection_from_environment"]
