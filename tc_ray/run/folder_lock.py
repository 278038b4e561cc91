"""The lock of a run folder: one driver at a time works in it.

The lease of the Mistake Log works on any storage and against other commands too. The lock is for the time before: a first
start has no log while it prepares its data, and a run with `log.enabled: false` never gets one. Invariant: the lock is the
kernel's (flock on `run.lock`), so it ends with its process, however that dies. The file's content only names the holder, so a
stale run is taken over by locking. Used by `run.job` and `tc-ray train-copilot`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path

from tc_ray.mistakelog.table.lease import WAIT_FOR_IT, Holder, LeaseHeldError

NAME = "run.lock"
_WRITTEN_SECONDS = 1.0
"""Time in which a new holder has written its name."""

log = logging.getLogger(__name__)


class FolderLock:
    """A held lock, a context manager. Its file stays after the process, without meaning.

    Args:
        folder: the run folder, which exists.
        what: the run, for the error of a second one.
        name: of the lock's file.

    Raises:
        LeaseHeldError: names the holder's host, process and start.
    """

    def __init__(self, folder: Path, what: str, name: str = NAME) -> None:
        path = folder / name
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise LeaseHeldError(f"{folder} is in use: {_holder(path)}. {WAIT_FOR_IT}") from None
        except OSError as error:
            log.warning("%s: this file system has no locks (%s); only the log's lease stops a second run", path, error)
            return
        try:
            os.ftruncate(self._handle, 0)
            os.write(self._handle, Holder.this(what).to_json())
        except OSError as error:  # a full disk; the lock is held without it
            log.warning("%s: the holder of the lock cannot be written there (%s)", path, error)

    def __enter__(self) -> FolderLock:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


def _holder(path: Path) -> str:
    until = time.monotonic() + _WRITTEN_SECONDS
    while time.monotonic() < until:
        try:
            holder = Holder.from_json(path.read_bytes())
            if holder.process.is_running() is not False:
                return str(holder)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        time.sleep(0.02)  # the holder is writing its name
    return "another run"
