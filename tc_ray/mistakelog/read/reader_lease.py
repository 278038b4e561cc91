"""Leases of readers: which versions of a log are being read, so that vacuum leaves their files alone.

Invariant: a version held here is in `held_versions` from `ReaderLease` or `move` on until its holder releases it, or is dead and its file
was not touched for `FRESH_SECONDS`. A reader that is choosing a version first holds the one that it knows and all
later ones ("onwards"): until it has a lease on its choice, no file of these versions is removed, however long it takes.

A lease is a file `_tc_ray/readers/ID.json`; one thread of a process renews all of its leases. A reader that may not write there (a
read-only share, a public bucket) has no lease and relies on `vacuum_grace_seconds`. Taken by readers, read by vacuum.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
import time
import uuid
import weakref
from dataclasses import asdict, dataclass

from tc_ray.mistakelog.table.lease import ProcessId
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore

log = logging.getLogger(__name__)

FRESH_SECONDS = 60.0
_RENEW_SECONDS = 15.0
_FOLDER = "_tc_ray/readers"

_leases: weakref.WeakSet[ReaderLease] = weakref.WeakSet()
_lock = threading.Lock()


class ReaderLease:
    """One reader's hold on one version, released by `release` or with the object.

    Args:
        onwards: and all later versions, because the holder is choosing one.
    """

    def __init__(self, location: Location, version: int, onwards: bool = False) -> None:
        self._location, self._name = location, f"{_FOLDER}/{uuid.uuid4().hex}.json"
        self._lock = threading.Lock()
        self._held: tuple[int, bool] | None = None
        self._wanted = version, onwards
        self._finish = weakref.finalize(self, _give_back, location, self._name, os.getpid())
        self.move(version, onwards)
        with _lock:
            _leases.add(self)
        _start_renewing()

    @property
    def version(self) -> int | None:
        """The version held, or the first of those held; None: no lease, because the location cannot be written."""
        return None if self._held is None else self._held[0]

    def move(self, version: int, onwards: bool = False) -> None:
        """Hold another version instead; onwards: and all later ones."""
        with self._lock:
            self._wanted = version, onwards
            if self._wanted != self._held and self._finish.alive:
                self._write()

    def _write(self) -> None:
        version, onwards = self._wanted
        content = {"version": version, "onwards": onwards, "process": asdict(ProcessId.this())}
        try:
            self._location.write(self._name, json.dumps(content).encode())
            self._held = self._wanted
        except OSError as error:
            # a lease on the old version may still be there: it holds too much at most
            log.debug("%s: no reader's lease on version %d: %s", self._location, version, error)
            self._held = None

    def renew(self) -> None:
        """Show that the reader lives; called by the renewing thread. A lease that could not be written is tried again."""
        with self._lock:
            if not self._finish.alive:
                return
            if self._held is None:
                self._write()
                return
            try:
                self._location.touch(self._name)
            except FileNotFoundError:  # taken for dead: this process was stopped for long
                self._write()
            except OSError as error:
                log.debug("%s: a reader's lease could not be renewed just now: %s", self._location, error)

    def release(self) -> None:
        """A second call does nothing."""
        with self._lock:
            self._finish()


def held(store: LogStore, version: int | None = None) -> ReaderLease:
    """A lease on `version`, or on the newest one, to which `store` moves while nothing of it can be removed."""
    lease = ReaderLease(store.location, store.version, onwards=True)
    store.refresh(version)
    lease.move(store.version)
    return lease


def _give_back(location: Location, name: str, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked process drops its copy
    try:
        location.delete(name)
    except OSError as error:  # it goes stale
        log.debug("%s: a reader's lease could not be released: %s", location, error)


@functools.cache
def _start_renewing() -> None:
    """Start the thread of this process that renews its leases."""
    threading.Thread(target=_renew, name="reader-leases", daemon=True).start()


def _renew() -> None:
    while True:
        time.sleep(_RENEW_SECONDS)
        with _lock:
            leases = list(_leases)
        while leases:
            leases.pop().renew()


@dataclass(frozen=True)
class HeldVersion:
    """A lease as vacuum sees it."""

    version: int
    onwards: bool
    """And all later ones: the reader is choosing one."""


def held_versions(location: Location, now: float) -> list[HeldVersion]:
    """Versions that living readers hold; the leases of dead ones are removed. now: see `Location.now`."""
    held = []
    for entry in location.list(_FOLDER, recursive=False):
        lease: HeldVersion | None = None
        process: ProcessId | None = None
        try:
            found = json.loads(location.read(entry.name))
            lease, process = HeldVersion(found["version"], found["onwards"]), ProcessId(**found["process"])
        except FileNotFoundError:
            continue  # released meanwhile
        except (ValueError, KeyError, TypeError):
            pass  # being written, or what a power cut or a kill left of that
        # read again, now that the file was opened: a share may have shown an old time
        touched = location.modified(entry.name) if now - entry.modified >= FRESH_SECONDS else entry.modified
        if touched is None:
            continue
        if now - touched >= FRESH_SECONDS and not (process and process.is_running()):
            location.delete(entry.name)
        elif lease is not None:
            held.append(lease)
    return held
