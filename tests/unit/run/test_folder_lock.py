"""The run folder's lock: a second run is refused before it touches anything, a dead one's lock is free at once."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tc_ray.mistakelog.table.lease import LeaseHeldError
from tc_ray.mistakelog.table.location import Location
from tc_ray.run.folder import NAME, FolderLock
from tc_ray.run.job import run_job
from tc_ray.run.prepare import prepare
from tc_ray.run.state import JobError, Run
from tests.support.tiny_run import tiny_config

REPOSITORY = Path(__file__).parents[3]
HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom tc_ray.run.folder import FolderLock\n"
    "with FolderLock(Path(sys.argv[1]), 'run first'):\n    print('held', flush=True)\n    time.sleep(600)"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("logged", [True, False])
def test_a_second_first_start_is_refused_and_makes_nothing(tmp_path: Path, logged: bool) -> None:
    """There is no log yet, or never will be: only the folder tells."""
    config = tiny_config(tmp_path, log__enabled=logged)
    config.run.path.mkdir()
    process = holder(config.run.path)
    try:
        with pytest.raises(LeaseHeldError) as refused:
            run_job(config)
    finally:
        process.kill()
        process.wait()
    assert re.search(
        rf"in use: run first, process {process.pid} on host {os.uname().nodename}, "
        r"started \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00\. Wait for it",
        str(refused.value),
    )
    assert [path.name for path in config.run.path.iterdir()] == [NAME]


def test_a_killed_holders_lock_is_free_at_once_and_names_the_next(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (
        FolderLock(tmp_path, "run next"),
        pytest.raises(LeaseHeldError, match=f"run next, process {os.getpid()} on host"),
    ):
        FolderLock(tmp_path, "run third")
    with FolderLock(tmp_path, "run third"):
        pass


def test_a_pilot_whose_folder_needs_its_own_code_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    model = Path(config.model.pilot)
    (model / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}}')
    (model / "mine.py").write_text("raise SystemExit")
    with pytest.raises(JobError, match=r"model\.pilot .* \(code in a model folder is never run\)"):
        prepare(Run(config, config.run.path, Location(config.log_location)))


def test_a_full_disk_does_not_undo_the_lock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content only says who holds it."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with FolderLock(tmp_path, "run first"):
        assert "the holder of the lock cannot be written" in caplog.text and "No space left" in caplog.text
        with pytest.raises(LeaseHeldError, match="in use: another run"):
            FolderLock(tmp_path, "run second")
    monkeypatch.undo()
    with FolderLock(tmp_path, "run third"), pytest.raises(LeaseHeldError, match="in use: run third"):
        FolderLock(tmp_path, "run fourth")
