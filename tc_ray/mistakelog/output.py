"""What a data file is written into: bytes on their way to a disk or an object store, counted and hashed.

Hashing runs in a thread beside the writing. Locally Arrow writes to the file itself, without a detour through Python,
and the thread reads along in the page cache through a memory map; while the rest is hashed, the file is already being
synced. Into an object store every block passes through Python anyway. Used by `ParquetPart` only.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import queue
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tc_ray.mistakelog.location import Location

_WAITING_BLOCKS = 64
_BLOCK = 1 << 20
"""Hashed at a time: small enough to be in the processor's cache for the second checksum."""


@dataclass(frozen=True)
class Finished:
    """A finished file's bytes."""

    size: int
    sha256: str
    """Hexadecimal."""
    crc32: int


class _Hasher:
    """A thread that hashes what it is given, in order."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._sha, self._crc32, self._size = hashlib.sha256(), 0, 0
        self._error: BaseException | None = None
        self._queue: queue.Queue[bytes | int | None] = queue.Queue(_WAITING_BLOCKS)
        self._thread = threading.Thread(target=self._work, name="mistake-log-hash", daemon=True)
        self._thread.start()

    def put(self, item: bytes | int) -> None:
        """Bytes, or (of a file) the size up to which it is written."""
        self._queue.put(item)

    def stop(self) -> None:
        """End the thread when everything is hashed."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def finish(self) -> Finished:
        """Checksums of all that was put."""
        self.stop()
        if self._error is not None:
            raise self._error
        return Finished(self._size, self._sha.hexdigest(), self._crc32)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the writer must not wait for a full queue
            try:
                self._add(memoryview(item)) if isinstance(item, bytes) else self._follow(item)
            except BaseException as error:  # noqa: BLE001 - raised again in `finish`
                self._error = error

    def _follow(self, size: int) -> None:
        if size == self._size:
            return
        assert self._path is not None
        start = self._size - self._size % mmap.ALLOCATIONGRANULARITY
        with (
            open(self._path, "rb") as file,
            mmap.mmap(file.fileno(), size - start, offset=start, prot=mmap.PROT_READ) as written,
            memoryview(written) as view,
            view[self._size - start :] as fresh,
        ):
            self._add(fresh)

    def _add(self, data: memoryview) -> None:
        for at in range(0, len(data), _BLOCK):
            with data[at : at + _BLOCK] as block:
                self._crc32 = zlib.crc32(block, self._crc32)
                self._sha.update(block)
        self._size += len(data)


class LocalOutput:
    """A file on a local disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sink = pa.OSFile(str(path), "wb")
        self._hasher = _Hasher(path)

    def advance(self) -> None:
        """More has been written: hash it meanwhile."""
        self._hasher.put(int(self.sink.tell()))

    def complete(self) -> Finished:
        """Bring everything to the disk."""
        self.advance()
        self.sink.close()
        handle = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
            self._hasher.stop()
        return self._hasher.finish()

    def abandon(self) -> None:
        """Close an unfinished file; its owner deletes it."""
        self._hasher.stop()
        with contextlib.suppress(OSError):
            self.sink.close()


class ObjectOutput:
    """An upload: the object appears when it is complete."""

    def __init__(self, location: Location, name: str) -> None:
        self._file = location.open_output(name)
        self._hasher = _Hasher(None)
        self.closed = False
        self.sink = pa.PythonFile(self, "w")

    def write(self, data: Any) -> int:
        """Called by Arrow, with bytes."""
        block = data if isinstance(data, bytes) else bytes(data)
        self._file.write(block)
        self._hasher.put(block)
        return len(block)

    def flush(self) -> None:
        """Called by Arrow: nothing is held back here."""

    def close(self) -> None:
        """Called by Arrow; `complete` is what ends the upload."""

    def advance(self) -> None:
        """Blocks were hashed as they came."""

    def complete(self) -> Finished:
        """End the upload."""
        self._file.close()
        return self._hasher.finish()

    def abandon(self) -> None:
        """Let go of the upload: not closed, it never becomes an object."""
        self._hasher.stop()


def open_output(location: Location, name: str) -> LocalOutput | ObjectOutput:
    """Begin a file; an existing one is overwritten."""
    if location.local is not None:
        return LocalOutput(location.local / name)
    return ObjectOutput(location, name)
