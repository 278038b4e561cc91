"""The run's lease: one process at a time may commit to a log.

Invariant: the lease is a number in the table, set by a Delta commit, so of two that want it one wins, on any storage; the file
`_tc_ray/lease-NUMBER.json` says who holds it and is touched while the holder lives. No file: the lease is free. A
holder on this machine is dead when its process is; one elsewhere when its file has not been touched for `STALE_SECONDS`
(by the clocks of this machine and the disk). Every commit of the holder carries the number, so one that was taken for
dead and wakes up finds another number there and stops. Held by the driver of a run and by commands that change a log.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
import weakref
from dataclasses import dataclass
from datetime import datetime, timezone

from tc_ray.mistakelog.location import Location
from tc_ray.mistakelog.process import ProcessId, is_running, this_process
from tc_ray.mistakelog.repair import repair
from tc_ray.mistakelog.store import CommitConflictError, LogStore, full_disk_named

LEASE_NUMBER = "tc_ray/lease"
STALE_SECONDS = 60.0
_TOUCH_SECONDS = 10.0
WAIT_FOR_IT = "Wait for it to end, or end it, and try again."

log = logging.getLogger(__name__)


class LeaseHeldError(RuntimeError):
    """Another process is at work on the log."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    process: ProcessId
    started: str
    """When the lease was taken, ISO 8601, UTC."""
    what: str
    """The run or command, for messages."""

    def __str__(self) -> str:
        return f"{self.what}, process {self.process.pid} on host {self.process.host}, started {self.started}"

    @classmethod
    def this(cls, what: str) -> Holder:
        """This process, from now on."""
        return cls(this_process(), datetime.now(timezone.utc).isoformat(timespec="seconds"), what)

    def to_json(self) -> bytes:
        """Content of the lease's file."""
        return json.dumps({"what": self.what, "started": self.started, **self.process.to_dict()}).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Holder:
        """Inverse of `to_json`."""
        told = json.loads(content)
        return cls(ProcessId.from_dict(told), told["started"], told["what"])


class RunLease:
    """A held lease; released at `release`, when it is let go, or by its process's end.

    Raises (from `take`):
        LeaseHeldError: names the holder's host, process and start.
        LogFullError: no space for the lease.
    """

    def __init__(self, location: Location, number: int) -> None:
        self.location, self.number = location, number
        self._stop = threading.Event()
        threading.Thread(
            target=_keep_touching, args=(location, _file(number), self._stop), name="log-lease", daemon=True
        ).start()
        self._finish = weakref.finalize(self, _let_go, location, number, self._stop)

    @classmethod
    def take(cls, location: Location, what: str) -> RunLease:
        """Take the lease of the log at `location`, which must exist; a dead holder's is taken over."""
        repair(location)
        while True:
            store = LogStore(location)
            current = store.number(LEASE_NUMBER)
            holder = _holder(location, current)
            if holder is not None:
                raise LeaseHeldError(f"{location} is in use: {holder}. {WAIT_FOR_IT}")
            mine = secrets.randbits(62)
            # first the file, so that the number is never there without it
            with full_disk_named(location):
                location.write(_file(mine), Holder.this(what).to_json())
            try:
                store.commit(numbers={LEASE_NUMBER: mine}, note={"kind": "lease", "what": what})
            except CommitConflictError:
                location.delete(_file(mine))
                continue
            except BaseException:
                location.delete(_file(mine))
                raise
            if current is not None:
                location.delete(_file(current))
            return cls(location, mine)

    def release(self) -> None:
        """Give the lease back."""
        self._finish()

    def __enter__(self) -> RunLease:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _file(number: int) -> str:
    return f"_tc_ray/lease-{number}.json"


def _holder(location: Location, number: int | None) -> str | None:
    """The living holder in words, or None."""
    if number is None:
        return None
    entries = [entry for entry in location.list("_tc_ray", recursive=False) if entry.name == _file(number)]
    if not entries:
        return None
    try:
        holder = Holder.from_json(location.read(_file(number)))
    except FileNotFoundError:
        return None
    silent = time.time() - entries[0].modified
    running = is_running(holder.process)
    if running is False or (running is None and silent > STALE_SECONDS):
        log.warning("%s: the lease of a dead process is taken over (%s)", location, holder)
        return None
    seen = (
        "" if running else f", last sign of life {max(0.0, silent):.0f} s ago (taken over after {STALE_SECONDS:.0f} s)"
    )
    return f"{holder}{seen}"


def _keep_touching(location: Location, name: str, stop: threading.Event) -> None:
    while not stop.wait(_TOUCH_SECONDS):
        try:
            location.touch(name)
        except FileNotFoundError:
            return  # taken over: the next commit will say so
        except OSError as error:
            log.warning("%s: the run's lease could not be renewed just now: %s", location, error)


def _let_go(location: Location, number: int, stop: threading.Event) -> None:
    stop.set()
    try:
        location.delete(_file(number))
    except OSError as error:  # it will be found stale
        log.warning("%s: the run's lease could not be given back: %s", location, error)
