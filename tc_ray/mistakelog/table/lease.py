"""The run's lease: one process at a time may commit to a log.

Invariant: the lease is a number in the table, set by a Delta commit, so of two that want it one wins, on any storage; the file
`_tc_ray/lease-NUMBER.json` says who holds it and is touched while the holder lives. No file: the lease is free. A
holder on this machine is dead when its process is; one elsewhere when its file has not been touched for `STALE_SECONDS`, told by
the disk's clock alone: no two machines' clocks are compared. Every commit of the holder is made on a version that has its
number (`LogStore`), so one that was taken for dead and wakes up cannot commit any more; the thread that touches the file looks at the
table too, and notes that the lease is lost, for good. Held by the driver of a run and by commands that change a log.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import weakref
from dataclasses import dataclass
from datetime import datetime, timezone

from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.table.errors import CommitConflictError, LeaseLostError, full_disk_named
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.process import ProcessId, is_running, this_process
from tc_ray.mistakelog.table.repair import repair
from tc_ray.mistakelog.table.store import LEASE_NUMBER, LogStore

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

    def __init__(self, location: Location, number: int, holder: Holder) -> None:
        self.location, self.number = location, number
        self._keeper = _Keeper(location, number, holder)
        threading.Thread(target=self._keeper.work, name="log-lease", daemon=True).start()
        self._finish = weakref.finalize(self, self._keeper.let_go)

    @property
    def lost(self) -> bool:
        """Another process has taken the log over, as far as was seen; looks at nothing."""
        return self._keeper.lost.is_set()

    def check(self) -> None:
        """Look at the table whether the lease is still held; where it cannot be read, what was known stands.

        Raises:
            LeaseLostError: it is not, for good.
        """
        if self._keeper.is_lost():
            raise LeaseLostError.of(self.location)

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
            store.adopt()
            myself = Holder.this(what)
            mine = secrets.randbits(62)
            # first the file, so that the number is never there without it
            with full_disk_named(location):
                location.write(_file(mine), myself.to_json())
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
            return cls(location, mine, myself)

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
    try:
        # read first: a share may show an old time of a file that was not opened lately
        holder = Holder.from_json(location.read(_file(number)))
    except FileNotFoundError:
        return None
    running, silent = is_running(holder.process), 0.0
    if running is None:
        with full_disk_named(location):
            now = location.now()
        touched = location.modified(_file(number))
        if touched is None:
            return None
        silent = now - touched
    if running is False or silent > STALE_SECONDS:
        log.warning("%s: the lease of a dead process is taken over (%s)", location, holder)
        return None
    seen = (
        "" if running else f", last sign of life {max(0.0, silent):.0f} s ago (taken over after {STALE_SECONDS:.0f} s)"
    )
    return f"{holder}{seen}"


class _Keeper:
    """Keeps the file of a lease fresh, in a thread that does not keep the lease's owner alive, and looks whether it is lost."""

    def __init__(self, location: Location, number: int, holder: Holder) -> None:
        self._location, self._number, self._holder = location, number, holder
        self._stop, self.lost = threading.Event(), threading.Event()
        self._lock = threading.RLock()  # the garbage collector may call `let_go` in the middle of anything

    def work(self) -> None:
        """Until the lease is given back or lost."""
        while not self._stop.wait(_TOUCH_SECONDS):
            if self.is_lost():
                log.error("%s", LeaseLostError.of(self._location))
                return
            try:
                self._touch()
            except OSError as error:
                log.warning("%s: the run's lease could not be renewed just now: %s", self._location, error)

    def is_lost(self) -> bool:
        """The table has another lease now, or had one once; where it cannot be read just now, what was known stands."""
        if not self.lost.is_set():
            try:
                if LogStore(self._location).number(LEASE_NUMBER) != self._number:
                    self.lost.set()
            except (OSError, DeltaError, ValueError) as error:
                log.debug("%s: the lease cannot be looked at just now: %s", self._location, error)
        return self.lost.is_set()

    def _touch(self) -> None:
        with self._lock:
            if self._stop.is_set():
                return
            try:
                self._location.touch(_file(self._number))
            except FileNotFoundError:  # taken away by hand: in the table the lease is held
                self._location.write(_file(self._number), self._holder.to_json())
            if self._stop.is_set():
                self._location.delete(_file(self._number))

    def let_go(self) -> None:
        """Give the lease back."""
        self._stop.set()
        try:
            with self._lock:
                self._location.delete(_file(self._number))
        except OSError as error:  # it will be found stale
            log.warning("%s: the run's lease could not be given back: %s", self._location, error)
