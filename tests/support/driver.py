"""A tiny run in a process of its own, to be stopped or killed: `python -m tests.support.driver FOLDER SETTINGS_AS_JSON`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tc_ray.cli.command import run_command
from tc_ray.run.job import run_job
from tests.support.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]


def start_driver(folder: Path, *, shell: tuple[str, ...] = (), **settings: Any) -> subprocess.Popen[bytes]:
    """Start the run of `tiny_config(folder, **settings)`; shell: words before the command. All output: `driver.log`."""
    with (folder / "driver.log").open("wb") as log:
        return subprocess.Popen(
            [*shell, sys.executable, "-m", "tests.support.driver", str(folder), json.dumps(settings)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def alive(pid: int) -> bool:
    try:
        # a zombie that nobody has waited for yet is dead
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    run_command(lambda: run_job(tiny_config(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
