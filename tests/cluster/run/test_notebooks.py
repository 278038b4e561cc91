"""The notebooks of examples/, cell by cell, with a tiny model: the second one reads the log of the first one's run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tc_ray.models.folder import FusionSettings
from tests.support.tiny_model import make_tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples"


def execute(name: str, folder: Path, *parameters: str) -> str:
    """Run a notebook in a process of its own, in `folder`; returns what it printed."""
    command = [sys.executable, "-m", "tests.support.notebook", str(EXAMPLES / name), *parameters]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def test_the_notebooks_run(tmp_path: Path) -> None:
    parameters = {
        "PILOT": str(make_tiny_llama(tmp_path / "model")),
        "ROWS": 132,
        # a token is a byte here
        "FITTING": ["data.cutoff_tokens=512", "pilot.lora.first_layer=0", "copilot.layers=[1, 3]"],
    }
    (tmp_path / "parameters.json").write_text(json.dumps(parameters))
    first = execute("first_run.ipynb", tmp_path, "parameters.json")
    assert "first-run/pilot" in first and first.splitlines()[-1] == "True"
    assert FusionSettings.read(tmp_path / "outputs/first-run/export").lam >= 0
    second = execute("mistake_log.ipynb", tmp_path)
    assert "loss" in second and "largest other" in second
    assert (tmp_path / "figure-1.png").read_bytes().startswith(b"\x89PNG")
