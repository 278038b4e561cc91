"""status.json: what a run is doing now, replaced atomically and at most once a second.

Invariant: a reader always sees a whole document, the last change lands even when nothing follows it, and while the run
lives the file is never much older than HEARTBEAT_SECONDS: an old one belongs to a dead run.
Written by `tracker.Tracker`, read by `tc-ray status` and the progress view, without Ray.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tc_ray.files import disk_time

STATUS_FILE = "status.json"
HEARTBEAT_SECONDS = 15.0
Status = dict[str, Any]
"""Keys: see `tracker.Tracker.status`."""


def read_status(folder: Path) -> Status:
    """Read the status of a run folder.

    Raises:
        FileNotFoundError: there is no such folder, or no run has started in it.
    """
    path = folder / STATUS_FILE
    try:
        status: Status = json.loads(path.read_text())
    except FileNotFoundError:
        why = "no run has started in it (no status.json)" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder}: {why}") from None
    return status


def silent_seconds(folder: Path) -> float:
    """How long status.json has not been written, by the disk's clock, for the run may be on another host.

    Where the folder may not be written, that clock cannot be asked: then by this host's.
    """
    try:
        now = disk_time(folder)
    except OSError:
        now = time.time()
    return now - (folder / STATUS_FILE).stat().st_mtime


def replace_json(path: Path, document: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    temporary.replace(path)


class StatusFile:
    """Throttled writer of status.json.

    Args:
        folder: run folder.
        make: returns the document; called at write time, from any thread.
        interval_s: least time between two writes.
    """

    def __init__(self, folder: Path, make: Callable[[], Status], interval_s: float = 1.0) -> None:
        self._path = folder / STATUS_FILE
        self._make = make
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._written_at = float("-inf")
        self._timer: threading.Timer | None = None
        self._due = False
        self._closed = False

    def touch(self) -> None:
        """Something changed: write now, or when the interval has passed."""
        with self._lock:
            wait_s = self._written_at + self._interval_s - time.monotonic()
            if wait_s > 0:
                if not self._due:
                    self._due = True
                    self._arm(wait_s)
                return
        self.write()

    def write(self) -> None:
        """Write now."""
        with self._lock:
            self._due = False
            self._written_at = time.monotonic()
            self._arm(HEARTBEAT_SECONDS)
        with self._write_lock:
            replace_json(self._path, self._make())

    def close(self) -> None:
        """Write for the last time."""
        with self._lock:
            self._closed = True
        self.write()

    def _arm(self, wait_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._closed:
            self._timer = threading.Timer(wait_s, self.write)
            self._timer.daemon = True
            self._timer.start()
