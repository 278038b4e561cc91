"""The run's lease: one process at a time may commit to a log. And which process that is.

Invariants:

- The lease is a number in the table that a Delta commit sets, so of two processes that want it one wins, on any storage. The
  file `_tc_ray/lease-NUMBER.json` says who holds it; a thread of the holder touches it. Without the file the lease is free.
- A holder on this machine is dead when its process is. A holder elsewhere is dead when its file was not touched for
  `STALE_SECONDS` by the disk's clock: clocks of two machines are never compared.
- Every commit of the holder is based on a version that has its number (`LogStore`), so a holder that was taken for dead and
  wakes up cannot commit. The thread that touches the file checks the table too; a lost lease is lost for good.

`ProcessId` also serves readers' leases and the run folder's lock.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from deltalake.exceptions import DeltaError

from tc_ray.mistakelog.table.errors import CommitConflictError, LeaseLostError, full_disk_named
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import repair
from tc_ray.mistakelog.table.store import LEASE_NUMBER, LogStore

STALE_SECONDS = 60.0
_TOUCH_SECONDS = 10.0
WAIT_FOR_IT = "Wait for it to end, or end it, and try again."

log = logging.getLogger(__name__)


class LeaseHeldError(RuntimeError):
    """Another process is at work on the log."""


@dataclass(frozen=True)
class ProcessId:
    """A process, distinguished from later processes with the same number."""

    host: str
    pid: int
    boot: str
    """Of the machine since its last start, and its process-number space (a container has its own); empty: not known."""
    born: str
    """When the process started, in the machine's clock ticks; empty: not known."""

    @classmethod
    def this(cls) -> ProcessId:
        """This one."""
        return cls(socket.gethostname(), os.getpid(), _boot(), _born(os.getpid()))

    def is_running(self) -> bool | None:
        """True or False if this machine can know; None: the process runs elsewhere."""
        if not self.boot or self.boot != _boot():
            return None
        return bool(self.born) and _born(self.pid) == self.born


def _boot() -> str:
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: only the time of the last sign of life counts
        return ""


def _born(pid: int) -> str:
    """Start time of a process; empty if there is none (a zombie counts as none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


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
        return cls(ProcessId.this(), datetime.now(timezone.utc).isoformat(timespec="seconds"), what)

    def to_json(self) -> bytes:
        """As bytes for a file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Holder:
        """Inverse of `to_json`."""
        stored = json.loads(content)
        return cls(ProcessId(**stored["process"]), stored["started"], stored["what"])


class RunLease:
    """A held lease; released by `release`, or by the end of its process. A thread touches its file and checks whether it is lost.

    Raises (from `take`):
        LeaseHeldError: names the holder's host, process and start.
        LogFullError: no space for the lease.
    """

    def __init__(self, location: Location, number: int, holder: Holder) -> None:
        self.location, self.number, self._holder = location, number, holder
        self._stop, self._lost = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="log-lease", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Another process has taken the log over, as far as is known; reads nothing."""
        return self._lost.is_set()

    def check(self) -> None:
        """Read from the table whether the lease is still held; if it cannot be read, what was known holds. Raises LeaseLostError."""
        if not self.lost:
            try:
                if LogStore(self.location).number(LEASE_NUMBER) != self.number:
                    self._lost.set()
            except (OSError, DeltaError, ValueError) as error:
                log.debug("%s: the lease cannot be checked just now: %s", self.location, error)
        if self.lost:
            raise LeaseLostError.of(self.location)

    def _work(self) -> None:
        while not self._stop.wait(_TOUCH_SECONDS):
            try:
                self.check()
                with self._lock:
                    if not self._stop.is_set():
                        try:
                            self.location.touch(_file(self.number))
                        except FileNotFoundError:  # in the table the lease is held
                            self.location.write(_file(self.number), self._holder.to_json())
            except LeaseLostError as error:
                log.error("%s", error)
                return
            except OSError as error:
                log.warning("%s: the run's lease could not be renewed just now: %s", self.location, error)

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
            mine, myself = secrets.randbits(62), Holder.this(what)
            # the file first, so that the number is never there without it
            with full_disk_named(location):
                location.write(_file(mine), myself.to_json())
            try:
                store.commit(numbers={LEASE_NUMBER: mine}, note={"kind": "lease", "what": what})
            except BaseException as error:
                location.delete(_file(mine))
                if isinstance(error, CommitConflictError):
                    continue
                raise
            for entry in location.list("_tc_ray", recursive=False):  # of dead holders, and of those that died above
                if entry.name.startswith("_tc_ray/lease-") and entry.name != _file(mine):
                    location.delete(entry.name)
            return cls(location, mine, myself)

    def release(self) -> None:
        """Give the lease back."""
        self._stop.set()
        try:
            with self._lock:
                self.location.delete(_file(self.number))
        except OSError as error:  # it goes stale
            log.warning("%s: the run's lease could not be given back: %s", self.location, error)

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
        # read before the time is asked for: a share may show an old time of a file that was not opened lately
        holder = Holder.from_json(location.read(_file(number)))
    except FileNotFoundError:
        return None
    running, silent = holder.process.is_running(), 0.0
    if running is None:
        with full_disk_named(location):
            now = location.now()
        silent = now - (location.modified(_file(number)) or 0.0)
    if running is False or silent > STALE_SECONDS:
        log.warning("%s: the lease of a dead process is taken over (%s)", location, holder)
        return None
    if running:
        return str(holder)
    return f"{holder}, last sign of life {max(0.0, silent):.0f} s ago (taken over after {STALE_SECONDS:.0f} s)"
