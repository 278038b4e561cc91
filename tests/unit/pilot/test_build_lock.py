"""A worker killed while it loads a compiled operator leaves a lock; the next start does not wait for it for ever."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from tc_ray.pilot import engine
from tc_ray.pilot.engine import clear_stale_build_locks, stale_build_locks_removed

HOLD = "import sys, time; from torch.utils.file_baton import FileBaton; print(FileBaton(sys.argv[1]).try_acquire(), flush=True); time.sleep(60)"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(engine, "LOOK_SECONDS", 0.1)
    (tmp_path / "py311_cpu" / "operator").mkdir(parents=True)
    return tmp_path / "py311_cpu" / "operator" / "lock"


def holder(lock: Path) -> subprocess.Popen[str]:
    """A process that holds torch's own lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


def test_a_start_goes_on_when_the_owner_dies(lock: Path) -> None:
    owner = holder(lock)
    time.sleep(0.2)
    assert clear_stale_build_locks() == [], "its owner lives"
    ended = threading.Event()
    with stale_build_locks_removed():
        waiting = threading.Thread(target=lambda: (FileBaton(str(lock)).wait(), ended.set()), daemon=True)
        waiting.start()
        assert not ended.wait(0.5), "a living owner's lock was removed"
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert ended.wait(10), "the start waits for a dead process"
