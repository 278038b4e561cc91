"""SIGTERM and SIGINT to a driver in mid-run: what `ray job stop`, Kubernetes and a user send."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tc_ray.tracking.statusfile import read_status
from tests.support.driver import start_driver

STATUS_SECONDS = 3.0
"""`ray job stop` kills after this time."""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_so_and_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    """Fault 11: SIGINT as it comes to a job of a background shell, where it is switched off at the start."""
    run, output = tmp_path / "run", tmp_path / "driver.log"
    background = ("sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    driver = start_driver(tmp_path, shell=background, pilot__max_rounds=2000, pilot__epochs=400)
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
