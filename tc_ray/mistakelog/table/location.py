"""Where a log is: a local folder or a prefix of an object store (s3://, gs://, az://), behind one small interface.

Invariants: a name is either absent or complete. Locally `write` renames a synced file into place; an object appears when its
upload ends. No name leads out of the location, by itself or over a symbolic link: names come from tables that others may have
made. Ages are measured with one clock, that of the disk or store (`now`, `modified`). Options are those of delta-rs, which also
reads the environment. Everything in this package that touches a file by name does so here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.fs as pafs

from tc_ray.config.redact import redact_address
from tc_ray.files import disk_time, sync, write_file
from tc_ray.mistakelog.rows.schema import LogSchemaError

_CLOCK = "_tc_ray/clock"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_FOREIGN = "this is not a log of tc-ray; nothing of it is read or changed"
_OWN_FOLDERS = ("_delta_log", "_tc_ray")


class OutsideError(LogSchemaError):
    """A name that leads out of a log's folder. Nothing there is read or changed."""


def check_data_name(table: object, name: str) -> None:
    """Raises OutsideError unless the name of a data file is relative, below the table's folder and in none of its own folders."""
    for text in {name, unquote(name)}:
        parts = text.split("/")
        if not text or "\0" in text or _SCHEME.match(text) or not {"", ".", ".."}.isdisjoint(parts):
            raise OutsideError(f"{table}: {name!r} is not a file below the table's folder: {_FOREIGN}")
        if parts[0] in _OWN_FOLDERS:
            raise OutsideError(f"{table}: {name!r} is not a data file: {_FOREIGN}")


@dataclass(frozen=True)
class Entry:
    """A file of a location."""

    name: str
    """Relative to the location, with slashes."""
    size: int
    modified: float
    """Unix seconds, by the clock of the disk or store."""


class Location:
    """A folder on a local disk or in an object store.

    Args:
        uri: path, file:// URI, or URI of an object store; another Location is copied.
        options: of the object store, as delta-rs names them; a local folder needs none.
    """

    def __init__(self, uri: str | Path | Location, options: Mapping[str, str] | None = None) -> None:
        text = uri.uri if isinstance(uri, Location) else str(uri)
        if isinstance(uri, Location):
            options = options or uri.options
        self.options: dict[str, str] = dict(options or {})
        self.local: Path | None = None
        if "://" in text and not text.startswith("file://"):
            self.uri: str = text.rstrip("/")
        else:
            self.local = Path(unquote(urlparse(text).path) if "://" in text else text).expanduser().absolute()
            self.uri = str(self.local)
        self._filesystem: pafs.FileSystem | None = None

    def __str__(self) -> str:
        return redact_address(self.uri)  # for messages: a URI may hold a key

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"  # options may hold a secret

    def __reduce__(self) -> tuple[Any, ...]:
        return Location, (self.uri, self.options)

    @property
    def filesystem(self) -> pafs.FileSystem:
        """Arrow file system whose root is this location."""
        if self._filesystem is None:
            if self.local is not None:
                self._filesystem = pafs.SubTreeFileSystem(str(self.local), pafs.LocalFileSystem())
            else:
                self._filesystem = pafs.PyFileSystem(self._handler())
        return self._filesystem

    def path(self, name: str) -> Path:
        """Where a file of a local location is. Raises OutsideError if that is not below it."""
        assert self.local is not None, "objects have no path"
        path, root = self.local / name, os.path.realpath(self.local)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise OutsideError(f"{path} leads out of the log's folder; it is neither read nor changed")
        return path

    def _handler(self) -> Any:
        from deltalake.fs import DeltaStorageHandler

        return DeltaStorageHandler(self.uri, options=self.options)

    def make(self) -> None:
        """Make the folder and its parents, durably; an object store needs none."""
        if self.local is None or self.local.is_dir():
            return
        made = [folder for folder in (self.local, *self.local.parents) if not folder.is_dir()]
        self.local.mkdir(parents=True, exist_ok=True)
        for folder in (*made, made[-1].parent):
            sync(folder)

    def read(self, name: str) -> bytes:
        """The whole content of a file. Raises FileNotFoundError."""
        if self.local is not None:
            return self.path(name).read_bytes()
        with self.filesystem.open_input_file(name) as file:
            return cast(bytes, file.read())

    def buffer(self, name: str) -> pa.Buffer:
        """The whole content without a copy: a memory map locally, one download from an object store."""
        if self.local is not None:
            # files of a log never change in place, so no page of the map vanishes under a reader
            with pa.memory_map(str(self.path(name))) as file:
                return file.read_buffer()
        with self.filesystem.open_input_file(name) as file:
            return file.read_buffer()

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a small file, atomically and durably."""
        if self.local is None:
            output = self.open_output(name)
            output.write(data)
            output.close()  # without it, as after an error, the object never appears
            return
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)

    def touch(self, name: str) -> None:
        """Set a file's modification time to now; needs no free space locally. Raises FileNotFoundError."""
        if self.local is not None:
            os.utime(self.path(name))
        else:
            self.write(name, self.read(name))

    def open_output(self, name: str) -> BinaryIO:
        """A file to write from the start. A local file is visible at once: use a temporary name and `rename`. An object appears
        when it is closed; without `close` it never does."""
        if self.local is not None:
            return open(self.path(name), "wb", buffering=0)
        return cast(BinaryIO, _ObjectOutput(self._handler()._handler.open_output_stream(name, None)))

    def rename(self, name: str, new: str) -> None:
        """Give a local file its final name, durably."""
        assert self.local is not None, "objects cannot be renamed"
        os.rename(self.path(name), self.path(new))
        sync(self.local)

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is fine."""
        if self.local is not None:
            self.path(name).unlink(missing_ok=True)
        elif self.size(name) is not None:
            self.filesystem.delete_file(name)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None: it is not there."""
        info = self._info(name)
        return None if info is None else info.size

    def modified(self, name: str) -> float | None:
        """When a file was last written or touched, as `Entry.modified`; None: it is not there."""
        info = self._info(name)
        return None if info is None else (info.mtime_ns or 0) / 1e9

    def _info(self, name: str) -> pafs.FileInfo | None:
        if self.local is not None:
            self.path(name)
        info = self.filesystem.get_file_info(name)
        return info if info.type == pafs.FileType.File else None

    def now(self) -> float:
        """Now, by the clock that stamps the files. Raises OSError if nothing may be written there."""
        if self.local is not None:
            return disk_time(self.local)
        self.write(_CLOCK, b"only its time counts")
        found = self.modified(_CLOCK)
        assert found is not None
        return found

    def list(self, under: str = "", *, recursive: bool = True) -> list[Entry]:
        """Files below `under`; empty when there are none."""
        selector = pafs.FileSelector(under, recursive=recursive, allow_not_found=True)
        return [
            Entry(info.path, info.size, (info.mtime_ns or 0) / 1e9)
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        ]


class _ObjectOutput:
    """Upload of one object. Takes any buffer; the client takes only bytes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, data: Any) -> int:
        content = data if isinstance(data, bytes) else bytes(data)
        self._stream.write(content)
        return len(content)

    def close(self) -> None:
        self._stream.close()
