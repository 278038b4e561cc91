"""What a data file is written into: bytes on their way to a disk or an object store, counted and hashed.

Hashing and syncing run in threads beside the writing. Locally Arrow writes to the file itself, without a detour through
Python, and hashing reads along in the page cache through a memory map. Into an object store every block passes through
Python anyway. Used by `ParquetPart` only.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from zlib_ng.zlib_ng import crc32

from tc_ray.mistakelog.table.location import Location

_WAITING_BLOCKS = 64
_WORTH_READING = 1 << 20
"""Bytes of a row group that is still being written, from which on hashing goes on at once."""
_GROWING = -1
"""Instead of a size: a row group is being written now."""
_LOOK_SECONDS = (0.001, 0.01)
"""Between looks at a file that grows: shortest, and longest when nothing comes (a disk that stalls)."""


@dataclass(frozen=True)
class Finished:
    """A finished file's bytes."""

    size: int
    sha256: str
    """Hexadecimal."""
    crc32: int


class _Checksums:
    """A thread that adds what is written to both checksums, in order: SHA-256 alone nearly keeps up with a fast disk.

    Args:
        path: of the file that sizes refer to; None: bytes are given.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._sha256, self._crc32, self._size = path, hashlib.sha256(), 0, 0
        self._error: BaseException | None = None
        self._queue: queue.Queue[bytes | int | None] = queue.Queue(_WAITING_BLOCKS)
        self._thread = threading.Thread(target=self._work, name="mistake-log-checksum", daemon=True)
        self._thread.start()

    def put(self, item: bytes | int) -> None:
        """Bytes, or (of a file) the size up to which it is written, or that it grows until the next size is put."""
        self._queue.put(item)

    def stop(self) -> None:
        """Wait until everything is added, and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def finish(self) -> Finished:
        """Checksums of all that was put."""
        self.stop()
        if self._error is not None:
            raise self._error
        return Finished(self._size, self._sha256.hexdigest(), self._crc32)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the writer must not wait for a full queue
            try:
                self._add(memoryview(item)) if isinstance(item, bytes) else self._follow(item)
            except BaseException as error:  # noqa: BLE001 - raised again by `finish`
                self._error = error

    def _follow(self, size: int) -> None:
        assert self._path is not None
        with open(self._path, "rb") as file:
            if size != _GROWING:
                self._read(file, size)
            # Parquet is only ever appended to: what of a row group stands there already need not wait for its end
            pause = _LOOK_SECONDS[0]
            while size == _GROWING and self._queue.empty():
                grown = os.fstat(file.fileno()).st_size
                if grown >= self._size + _WORTH_READING:
                    self._read(file, grown)
                    pause = _LOOK_SECONDS[0]
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, _LOOK_SECONDS[1])

    def _read(self, file: BinaryIO, size: int) -> None:
        if size <= self._size:
            return
        start = self._size - self._size % mmap.ALLOCATIONGRANULARITY
        with (
            mmap.mmap(file.fileno(), size - start, offset=start, prot=mmap.PROT_READ) as written,
            memoryview(written) as view,
            view[self._size - start :] as fresh,
        ):
            self._add(fresh)

    def _add(self, data: memoryview) -> None:
        # whole, since each call waits for the interpreter's lock afterwards
        self._sha256.update(data)
        self._crc32 = crc32(data, self._crc32)
        self._size += len(data)


class _Syncing:
    """A thread that brings a file to the disk while it is written, so that little is left to wait for at its end.

    The system tells of a page that could not be written once, to the sync that meets it first: that may be one of these, so
    `check` must raise it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: OSError | None = None
        self._more = threading.Semaphore(0)
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="mistake-log-sync", daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """More has been written."""
        self._more.release()

    def stop(self) -> None:
        """End the thread."""
        self._ending = True
        self._more.release()
        self._thread.join()

    def check(self) -> None:
        """Raise what went wrong in the thread, which has ended."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            handle = os.open(self._path, os.O_RDONLY)
            try:
                while True:
                    self._more.acquire()
                    while self._more.acquire(blocking=False):
                        pass  # one sync does for all that was written by now
                    if self._ending:
                        return
                    os.fdatasync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            self._error = error


class LocalOutput:
    """A file on a local disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sink = pa.OSFile(str(path), "wb")
        self._checksums = _Checksums(path)
        self._syncing: _Syncing | None = None

    def growing(self) -> None:
        """A row group is about to be written: hash it meanwhile. `advance`, `complete` or `abandon` follows."""
        self._checksums.put(_GROWING)

    def advance(self) -> None:
        """More has been written: hash the rest and bring it to the disk meanwhile."""
        self._checksums.put(int(self.sink.tell()))
        if self._syncing is None:
            self._syncing = _Syncing(self._path)
        self._syncing.advance()

    def complete(self) -> Finished:
        """Bring everything to the disk."""
        self._checksums.put(int(self.sink.tell()))
        self.sink.close()
        if self._syncing is not None:
            self._syncing.stop()
        handle = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
            self._checksums.stop()
        if self._syncing is not None:
            self._syncing.check()
        return self._checksums.finish()

    def abandon(self) -> None:
        """Close an unfinished file; its owner deletes it."""
        if self._syncing is not None:
            self._syncing.stop()
        self._checksums.stop()
        with contextlib.suppress(OSError):
            self.sink.close()


class ObjectOutput:
    """An upload: the object appears when it is complete."""

    def __init__(self, location: Location, name: str) -> None:
        self._file = location.open_output(name)
        self._checksums = _Checksums(None)
        self.closed = False
        self.sink = pa.PythonFile(self, "w")

    def write(self, data: Any) -> int:
        """Called by Arrow, with bytes."""
        block = data if isinstance(data, bytes) else bytes(data)
        self._file.write(block)
        self._checksums.put(block)
        return len(block)

    def flush(self) -> None:
        """Called by Arrow: nothing is held back here."""

    def close(self) -> None:
        """Called by Arrow; `complete` is what ends the upload."""

    def growing(self) -> None:
        """Blocks are hashed as they come."""

    def advance(self) -> None:
        """Blocks were hashed as they came."""

    def complete(self) -> Finished:
        """End the upload."""
        self._file.close()
        return self._checksums.finish()

    def abandon(self) -> None:
        """Let go of the upload: not closed, it never becomes an object."""
        self._checksums.stop()


def open_output(location: Location, name: str) -> LocalOutput | ObjectOutput:
    """Begin a file; an existing one is overwritten."""
    if location.local is not None:
        return LocalOutput(location.path(name))
    return ObjectOutput(location, name)
