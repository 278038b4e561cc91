"""kill -9 of a study in the middle of a cell: the same command goes on, and does nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tc_ray.pilot.checkpoint import latest_checkpoint
from tc_ray.study.cells import Cells, cells_of
from tc_ray.study.file import Study, load_study
from tc_ray.study.schedule import folder_of
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tests.support.driver import alive
from tests.support.study_samples import write_study

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 40


def start(file: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tc_ray.cli.main", "study", str(file)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def killed_in_the_second_cell(file: Path, study: Study, cells: Cells, log: Path) -> None:
    first, second = (folder_of(study, cell) for cell in cells.by_key.values())
    driver, end = start(file, log), time.monotonic() + 600
    try:
        while latest_checkpoint(second / "pilot" / "checkpoints") is None:
            assert driver.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    while any(alive(pid) for pid in read_status(second)["processes"].values()):
        assert time.monotonic() < end, "workers outlive their study"
        time.sleep(0.1)
    assert read_status(second)["state"] == "running" and read_status(first)["state"] == "done"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_same_command_goes_on(tmp_path: Path) -> None:
    file = write_study(tmp_path, tasks={"sums": {"pilot": {"max_rounds": ROUNDS, "epochs": 20}}})
    study = load_study(file)
    cells = cells_of(study)
    killed_in_the_second_cell(file, study, cells, tmp_path / "first.log")
    (kept,) = (study.folder / "results").iterdir()
    written = kept.stat().st_mtime_ns
    again = start(file, tmp_path / "again.log")
    assert again.wait(timeout=600) == 0, (tmp_path / "again.log").read_text()[-3000:]
    assert kept.stat().st_mtime_ns == written
    assert {path.stem for path in (study.folder / "results").iterdir()} == set(cells.by_key)
    first, second = (folder_of(study, cell) for cell in cells.by_key.values())
    for folder in (first, second):
        rounds = [point["round"] for point in read_points(folder / "metrics.jsonl") if point["kind"] == "pilot"]
        assert rounds == list(range(1, ROUNDS + 1))
    events = [event["text"] for event in read_status(second)["events"]]
    assert any(text.startswith("Pilot attempt 2 resumes after round") for text in events)
    assert "copilot" in (study.folder / "report.md").read_text()
