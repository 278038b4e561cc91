"""docs/first-hour.md as a new user follows it: every command of the page in order, in an empty folder, on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support.ports import free_port
from tests.support.tiny_model import make_tiny_llama
from tests.support.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8")
INSTALL = re.compile(r"^(?:python -m venv|source|pip install|cd) ")
SERVE = "tc-ray serve "
TINY = {"layers: [4, 9, 14, 19, 24, 29]": "layers: [1, 3]", "first_layer: 10": "first_layer: 0"}
"""What a model of four layers needs in the recipe, beside its name."""


def test_the_page_s_commands_run(tmp_path: Path) -> None:
    folder, port = tmp_path / "shop", free_port()
    folder.mkdir()
    home = make_home(tmp_path)
    for name, text in re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        (folder / name).write_text(text.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    commands = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [command for command in commands if command and not INSTALL.match(command)]
    assert [command for command in commands if command.startswith(SERVE)] and "python ask.py" in commands
    said: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for command in commands:
            if command.startswith(SERVE):
                stack.enter_context(served(f"{command} --port {port}", folder, home, port))
                continue
            done = subprocess.run(
                ["bash", "-ec", command], cwd=folder, env=home, capture_output=True, text=True, timeout=900, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            said[command] = done.stdout
            if command.startswith("tc-ray init"):
                on_a_tiny_model(folder / "my-run" / "recipe.yaml", tmp_path / "model")
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 50
    status = json.loads((folder / "outputs/my-run/status.json").read_text())
    assert status["state"] == "done"
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    answers = said["python ask.py"]  # noise of random weights, line ends among it
    assert answers.startswith("my-run: ") and "\nlambda 0: " in answers


def make_home(tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose `tc-ray` and `python` are those of this checkout."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, start in {"python": "", "tc-ray": "-m tc_ray.cli.main"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        (programs / name).chmod(0o755)
    own = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "TC_RAY_", "MLFLOW_"))}
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**own, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def on_a_tiny_model(recipe: Path, model: Path) -> None:
    make_tiny_llama(model)
    text = recipe.read_text()
    for old, new in {**TINY, "pilot: smollm2-135m-instruct": f"pilot: {model}"}.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)


@contextlib.contextmanager
def served(command: str, folder: Path, home: dict[str, str], port: int) -> Iterator[None]:
    """The server of `command` from its first answer on; ended as by Ctrl-C."""

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
                return True
        except (URLError, OSError):
            return False

    log = folder / "serve.out"
    with log.open("w") as out:
        server = subprocess.Popen(command.split(), cwd=folder, env=home, stdout=out, stderr=subprocess.STDOUT)
    try:
        until(answers, seconds=300)
        yield
        server.send_signal(signal.SIGINT)
        assert server.wait(120) == 0, log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait(30)
