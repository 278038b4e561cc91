"""status.json: what a run is doing now, replaced atomically and at most once a second.

Invariant: a reader always sees a whole document. The last change is written even if no other follows. While the run lives
the file is never much older than HEARTBEAT_SECONDS, so an old one belongs to a dead run. The file only shows what a run does:
an error in writing or reading it stops nothing.
Written by `tracker.Tracker`, read by `tc-ray status` and the progress view, without Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat

from tc_ray.files import DamagedFileError, disk_time, finite, read_json, typed, write_json
from tc_ray.tracking.points import RESTART

STATUS_FILE = "status.json"
HEARTBEAT_SECONDS = 15.0
EVENTS_SHOWN = 20
Status = dict[str, Any]
"""Keys: see `tracker.Tracker.status`."""


class NoRunError(FileNotFoundError):
    """The folder holds no run; the message names it and says what is missing."""


log = logging.getLogger(__name__)

_Time = Annotated[float, Field(ge=0, le=1e11)]


class _Part(BaseModel):
    round: int | None = None
    step: int | None = None
    metrics: dict[str, FiniteFloat | None] = {}


class _Plan(BaseModel):
    rounds_total: int | None = None
    copilot_steps_total: int | None = None


class _Event(BaseModel):
    time: _Time
    kind: str
    text: str
    count: int = 1


class _MLflow(BaseModel):
    command: str | None = None


class _Document(BaseModel):
    """What readers rely on in a status.json; it may hold more."""

    run: str
    state: str
    phase: str
    started: _Time
    updated: _Time
    plan: _Plan
    pilot: _Part
    copilot: _Part
    log: _Part
    tokens_per_second: FiniteFloat | None
    rounds_per_minute: FiniteFloat | None
    eta_seconds: FiniteFloat | None
    restarts: int
    events: list[_Event]
    processes: dict[str, int]
    evaluation: dict[str, Any]
    mlflow: _MLflow | None


def add_event(events: list[dict[str, Any]], time: float, kind: str, text: str) -> None:
    """Add an event to those of a status, or raise the `count` of one with the same kind and text (except restarts).

    The newest EVENTS_SHOWN restarts and as many other events stay, so that others never push out restarts.
    """
    alike = [event for event in events if (event["kind"] == RESTART) == (kind == RESTART)]
    if kind != RESTART:
        for event in alike:
            if (event["kind"], event["text"]) == (kind, text):
                event["count"] = event.get("count", 1) + 1
                return
    if len(alike) >= EVENTS_SHOWN:
        events.remove(alike[0])
    events.append({"time": time, "kind": kind, "text": text})


def read_status(folder: Path) -> Status:
    """Read the status of a run folder.

    Raises:
        NoRunError: there is no such folder, or no run has started in it. DamagedFileError: status.json holds no status.
    """
    path = folder / STATUS_FILE
    try:
        status: Status = finite(read_json(path))
        typed(status, _Document, path)
    except FileNotFoundError:
        why = "no run has started in it (no status.json)" if folder.is_dir() else "there is no such folder"
        raise NoRunError(f"{folder}: {why}") from None
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{error}. The file only shows what the run does: `tc-ray train` with the same recipe resumes and writes it anew"
        ) from None
    return status


def silent_seconds(folder: Path) -> float:
    """Seconds since status.json was written, by the disk's clock, or this host's in a folder that may not be written."""
    try:
        now = disk_time(folder)
    except OSError:
        now = time.time()
    return now - (folder / STATUS_FILE).stat().st_mtime


class StatusFile:
    """Throttled writer of status.json.

    Args:
        folder: run folder.
        make: returns the document; called at write time, from any thread.
        interval_s: least time between two writes for changes.
    """

    def __init__(self, folder: Path, make: Callable[[], Status], interval_s: float = 1.0) -> None:
        self._path = folder / STATUS_FILE
        self._make = make
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._changed, self._closed = threading.Event(), threading.Event()
        self._failing = False
        threading.Thread(target=self._work, name="status-file", daemon=True).start()

    def touch(self) -> None:
        """Something changed: it is written within the interval."""
        self._changed.set()

    def write(self) -> None:
        """Write now."""
        with self._lock:
            try:
                write_json(self._path, finite(self._make()), indent=1)
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.warning("%s cannot be written (%s); trying again at each change", self._path, error)
                self._failing = True

    def close(self) -> None:
        """Write for the last time."""
        self._closed.set()
        self._changed.set()
        self.write()

    def _work(self) -> None:
        while not self._closed.is_set():
            self._changed.wait(HEARTBEAT_SECONDS)
            self._changed.clear()
            if not self._closed.is_set():
                self.write()
            self._closed.wait(self._interval_s)
