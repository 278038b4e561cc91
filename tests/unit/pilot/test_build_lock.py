"""A worker killed while it loads a compiled operator leaves a lock; the next start does not wait for it for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from tc_ray.pilot import build_lock
from tc_ray.pilot.build_lock import STALE_LOCK_SECONDS, clear_stale_build_locks, stale_build_locks_removed

HOLD = "import sys, time; from torch.utils.file_baton import FileBaton; print(FileBaton(sys.argv[1]).try_acquire(), flush=True); time.sleep(60)"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build_lock, "_LOOK_SECONDS", 0.1)
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


def test_without_proc_age_and_quiet_tell(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_lock, "_is_open", lambda file: None)
    old = time.time() - 2 * STALE_LOCK_SECONDS
    for source_age, lock_age, stale in ((time.time(), old, False), (old, time.time(), False), (old, old, True)):
        for file, stamp in ((lock.with_name("main.o"), source_age), (lock, lock_age)):
            file.write_text("")
            os.utime(file, (stamp, stamp))
        assert clear_stale_build_locks() == ([lock] if stale else [])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parent / "absent"))
    assert clear_stale_build_locks() == []


def test_an_operator_that_is_compiled_is_reported_once(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 22: a lock that is held longer than loading takes is a compiler at work, here or in another process."""
    monkeypatch.setattr(build_lock, "BUILD_SECONDS", 0.5)
    said: list[float] = []
    owner = holder(lock)
    began = time.monotonic()
    try:
        with stale_build_locks_removed(lambda: said.append(time.monotonic() - began)):
            time.sleep(1.5)
        assert len(said) == 1 and said[0] > 0.5
        lock.with_name("operator.so").write_text("")
        with stale_build_locks_removed(lambda: said.append(0.0)):
            time.sleep(1.0)
        assert len(said) == 1, "an operator that is there is only loaded"
    finally:
        owner.kill()
        owner.wait()
    lock.unlink(missing_ok=True)
    said.clear()
    with stale_build_locks_removed(lambda: said.append(0.0)):
        for _ in range(5):  # as when operators that are there are loaded
            lock.write_text("")
            time.sleep(0.1)
            lock.unlink(missing_ok=True)
            time.sleep(0.15)
    assert not said
