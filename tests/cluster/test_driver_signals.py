"""SIGTERM and SIGINT to a driver in mid-run: what `ray job stop`, Kubernetes and a user send."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tc_ray.cli.command import run_command
from tc_ray.run.job import run_job
from tc_ray.tracking.statusfile import read_status
from tests.support.tiny_run import tiny_config

REPOSITORY = Path(__file__).parents[2]
MODULE = "tests.cluster.test_driver_signals"
STATUS_SECONDS = 3.0
"""`ray job stop` kills after this time."""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_says_so_and_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    """Fault 11: SIGINT as it comes to a job of a background shell, where it is switched off at the start."""
    output = tmp_path / "driver.log"
    with output.open("wb") as log:
        driver = subprocess.Popen(
            ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-m", MODULE, str(tmp_path)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    run = tmp_path / "run"
    end = time.monotonic() + 150
    try:
        while not (run / "status.json").exists() or read_status(run)["pilot"].get("round", 0) < 3:
            assert driver.poll() is None and time.monotonic() < end, output.read_text()[-3000:]
            time.sleep(0.05)
        driver.send_signal(number)
        asked = time.monotonic()
        while read_status(run)["state"] == "running":
            assert time.monotonic() < asked + STATUS_SECONDS, output.read_text()[-3000:]
            time.sleep(0.05)
        assert driver.wait(60) == 128 + number
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    assert read_status(run)["state"] == "stopped"
    text = output.read_text()
    assert f"stopped by {number.name}; the same command resumes from the last checkpoint in {run}\n" in text
    for words in ("Traceback", "*** SIG", "raylet", "StackTrace"):
        assert words not in text, text[-3000:]


if __name__ == "__main__":
    run_command(lambda: run_job(tiny_config(Path(sys.argv[1]), pilot__max_rounds=2000, pilot__epochs=400)))
