"""Removes locks of compiled operators that a killed process left: they would block every later start for ever (pytorch#189245).

torch takes such a lock each time it loads DeepSpeed's shared-memory operator, for a second, or for half a minute at the first compile; a
worker killed in that time leaves the file. Its owner has it open while it lives, so on this machine a lock that no process has open
is stale. Ages are measured with the clock of the folder's disk. Called around DeepSpeed's start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tc_ray.files import disk_time

STALE_LOCK_SECONDS = 90.0
"""Age of a lock, and of the newest file beside it, at which it is stale if its owner cannot be found out (no /proc)."""
BUILD_SECONDS, REBUILD_SECONDS = 3.0, 20.0
"""Seconds that a lock is held before a compiler is assumed: without an operator in the folder, and with one, which a busy machine
loads slowly."""
_LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


@contextlib.contextmanager
def stale_build_locks_removed(on_build: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Remove stale locks now, and while the enclosed start runs: a dying worker of the last attempt may still hold one.

    Args:
        on_build: called once, from another thread, when an operator is being compiled, here or by another process.
    """
    done = threading.Event()

    def look() -> None:
        since: dict[Path, float] = {}
        building = False
        while not done.wait(_LOOK_SECONDS):
            clear_stale_build_locks()
            since = {lock: since.get(lock, time.monotonic()) for lock in _locks()}
            for lock, began in since.items():
                limit = REBUILD_SECONDS if any(lock.parent.glob("*.so")) else BUILD_SECONDS
                if not building and time.monotonic() - began > limit:
                    building = True
                    on_build()

    clear_stale_build_locks()
    threading.Thread(target=look, name="build-locks", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def clear_stale_build_locks() -> list[Path]:
    """Remove locks whose owner is dead, and return them.

    Owners in other containers or on other machines cannot be seen: give each that shares the folder an own TORCH_EXTENSIONS_DIR.
    """
    removed = []
    for lock in _locks():
        try:
            if _is_stale(lock):
                lock.unlink()
                removed.append(lock)
                log.warning("%s removed: a killed process left it", lock)
        except (FileNotFoundError, PermissionError):
            continue  # its owner has just finished, or it belongs to another user
    return removed


def _locks() -> list[Path]:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    return list(root.glob("**/lock")) if root.is_dir() else []


def _is_stale(lock: Path) -> bool:
    is_open = _is_open(lock)
    if is_open is None:
        newest = max(path.stat().st_mtime for path in lock.parent.iterdir())
        return disk_time(lock.parent) - newest > STALE_LOCK_SECONDS
    # an owner that has just created the file may not show it in /proc yet
    return not is_open and disk_time(lock.parent) - lock.stat().st_mtime > _LOOK_SECONDS


def _is_open(file: Path) -> bool | None:
    """Whether a process of this machine has the file open; None: this system has no /proc."""
    if not Path("/proc/self/fd").is_dir():
        return None
    wanted = str(file.resolve())
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.readlink(entry) == wanted:
                return True
    return False
