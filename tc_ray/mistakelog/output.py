"""What a data file is written into: bytes on their way to a disk or an object store, counted and hashed.

Hashing runs in threads beside the writing. Locally Arrow writes to the file itself, without a detour through Python,
and the threads read along in the page cache through a memory map; while the rest is hashed, the file is already being
synced. Into an object store every block passes through Python anyway. Used by `ParquetPart` only.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from zlib_ng.zlib_ng import crc32

from tc_ray.mistakelog.location import Location

_WAITING_BLOCKS = 64
_BLOCK = 1 << 20
"""Added at a time: each call lets other threads run."""


@dataclass(frozen=True)
class Finished:
    """A finished file's bytes."""

    size: int
    sha256: str
    """Hexadecimal."""
    crc32: int


class _Sum:
    """A thread that adds to one checksum what it is given, in order.

    Args:
        add: takes a block.
        path: of the file that sizes refer to; None: bytes are given.
    """

    def __init__(self, add: Callable[[memoryview], object], path: Path | None) -> None:
        self._add, self._path = add, path
        self.size = 0
        self._error: BaseException | None = None
        self._queue: queue.Queue[bytes | int | None] = queue.Queue(_WAITING_BLOCKS)
        self._thread = threading.Thread(target=self._work, name="mistake-log-checksum", daemon=True)
        self._thread.start()

    def put(self, item: bytes | int) -> None:
        """Bytes, or (of a file) the size up to which it is written."""
        self._queue.put(item)

    def stop(self) -> None:
        """Wait until everything is added, and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # the writer must not wait for a full queue
            try:
                self._blocks(memoryview(item)) if isinstance(item, bytes) else self._follow(item)
            except BaseException as error:  # noqa: BLE001 - raised again by `check`
                self._error = error

    def _follow(self, size: int) -> None:
        if size == self.size:
            return
        assert self._path is not None
        start = self.size - self.size % mmap.ALLOCATIONGRANULARITY
        with (
            open(self._path, "rb") as file,
            mmap.mmap(file.fileno(), size - start, offset=start, prot=mmap.PROT_READ) as written,
            memoryview(written) as view,
            view[self.size - start :] as fresh,
        ):
            self._blocks(fresh)

    def _blocks(self, data: memoryview) -> None:
        for at in range(0, len(data), _BLOCK):
            with data[at : at + _BLOCK] as block:
                self._add(block)
        self.size += len(data)


class _Checksums:
    """Both checksums of a file, each in a thread of its own: SHA-256 alone nearly keeps up with a fast disk."""

    def __init__(self, path: Path | None) -> None:
        self._sha256, self._crc32 = hashlib.sha256(), 0
        self._sums = (_Sum(self._sha256.update, path), _Sum(self._add_crc32, path))

    def _add_crc32(self, block: memoryview) -> None:
        self._crc32 = crc32(block, self._crc32)

    def put(self, item: bytes | int) -> None:
        """Bytes, or (of a file) the size up to which it is written."""
        for one in self._sums:
            one.put(item)

    def stop(self) -> None:
        """End the threads when everything is added."""
        for one in self._sums:
            one.stop()

    def finish(self) -> Finished:
        """Checksums of all that was put."""
        self.stop()
        for one in self._sums:
            one.check()
        return Finished(self._sums[0].size, self._sha256.hexdigest(), self._crc32)


class LocalOutput:
    """A file on a local disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sink = pa.OSFile(str(path), "wb")
        self._checksums = _Checksums(path)

    def advance(self) -> None:
        """More has been written: hash it meanwhile."""
        self._checksums.put(int(self.sink.tell()))

    def complete(self) -> Finished:
        """Bring everything to the disk."""
        self.advance()
        self.sink.close()
        handle = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
            self._checksums.stop()
        return self._checksums.finish()

    def abandon(self) -> None:
        """Close an unfinished file; its owner deletes it."""
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
        return LocalOutput(location.local / name)
    return ObjectOutput(location, name)
