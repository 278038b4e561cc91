"""Data files on disks and in object stores: what lies at a place, and its bytes and lines, decompressed.

A place is a file, a folder, a pattern (`shards/*.jsonl`, `**` for all folders below), or an address that Arrow's file systems
read (s3://, gs://, abfs://, with options as in `?endpoint_override=...`). Invariant: a file is read where it is, by whichever process needs it, and its address is what
messages name. Credentials come from the environment. Called by `find` in the driver, by `readers` in Ray's tasks.
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urlsplit

from tc_ray.data.source.records import DataError
from tc_ray.text import first_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

COMPRESSED = (".gz", ".zst")
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True, order=True)
class DataFile:
    """A file of records. place: its absolute path or address.

    rows: the records that are read of it, [first, last) counted from 0; None: all. `shares` cuts a file so.
    """

    place: str
    rows: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.place

    @property
    def name(self) -> str:
        """Its last name, compression included."""
        path = unquote(urlsplit(self.place).path) if is_address(self.place) else self.place
        return path.rpartition("/")[2]

    @property
    def kind(self) -> str:
        """What the name says that it holds: its suffix in lower case, without that of a compression."""
        name = PurePosixPath(self.name.lower())
        return (name.with_suffix("") if name.suffix in COMPRESSED else name).suffix

    @property
    def first(self) -> bool:
        """It has the file's first records."""
        return self.rows is None or self.rows[0] == 0

    @property
    def local_bytes(self) -> int | None:
        """Its size on this machine; None for an object of a store."""
        return None if is_address(self.place) else os.path.getsize(self.place)


@dataclass(frozen=True)
class Listing:
    """What lies at a place. root: what the names are relative to. one: the place is itself a file.

    files: by relative name, in order; None: not a file (a link to a folder or to nothing).
    """

    root: str
    files: dict[str, DataFile | None]
    one: bool = False


def is_address(place: str) -> bool:
    """s3://bucket/key and its like, in contrast to a path."""
    return "://" in place


def is_pattern(place: str) -> bool:
    """A name with wildcards; in an address `?` begins its options."""
    return _PATTERN.search(place.partition("?")[0] if is_address(place) else place) is not None


def list_place(place: str) -> Listing:
    """The files at a place; none where nothing is there. Raises DataError: an address cannot be read."""
    if is_address(place):
        return _list_store(place)
    path = Path(place).expanduser().absolute()
    if path.is_file():
        return Listing(str(path.parent), {path.name: DataFile(str(path))}, one=True)
    root, found = path, sorted(path.rglob("*"))
    if not path.exists() and is_pattern(str(path)):
        root = Path(_fixed(str(path)) or "/")
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        found = sorted({file for match in matches for file in [match, *match.rglob("*")]})
    files = [file for file in found if file.is_file() or file.is_symlink()]
    return Listing(
        str(root), {f.relative_to(root).as_posix(): DataFile(str(f)) if f.is_file() else None for f in files}
    )


def _fixed(place: str) -> str:
    """The folders of a pattern before its first wildcard."""
    parts = place.split("/")
    return "/".join(parts[: next(index for index, part in enumerate(parts) if is_pattern(part))])


def _list_store(place: str) -> Listing:
    from pyarrow.fs import FileSelector, FileType

    address, _, options = place.partition("?")
    root = _fixed(address) if is_pattern(address) else address.rstrip("/")
    options = f"?{options}" if options else ""
    if "@" in urlsplit(address).netloc:  # not named: it would be in every log
        raise DataError("an address of data holds a key: leave it out; credentials come from the environment")
    try:
        store, path = _store(root + options)
        (info,) = store.get_file_info([path])
        found = [info] if info.type == FileType.File else []
        if info.type == FileType.Directory:
            found = store.get_file_info(FileSelector(path, recursive=True))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{place}: cannot be read: {first_line(error)}; the address must be right, and credentials and endpoint come from "
            "the environment (of S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL)"
        ) from None
    scheme = place.partition("://")[0]
    one = info.type == FileType.File
    base = path.rpartition("/")[0] if one else path
    pattern = address[len(root) :].lstrip("/").split("/") if is_pattern(address) else None
    files: dict[str, DataFile | None] = {}
    for entry in sorted(found, key=lambda entry: entry.path):
        name = entry.path[len(base) :].lstrip("/")
        if entry.type == FileType.File and (pattern is None or _matches(name.split("/"), pattern)):
            files[name] = DataFile(f"{scheme}://{quote(entry.path)}{options}")
    return Listing(base if one else root, files, one)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a file (folders and its name) is one that the pattern, in the same parts, means on a disk.

    As of the local `glob`, `**` is any number of folders; of a folder that matches, all files below are meant.
    """
    if not pattern or not names:
        return not pattern
    if pattern[0] == "**":
        return any(_matches(names[skipped:], pattern[1:]) for skipped in range(len(names)))
    return fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _store(address: str) -> tuple[FileSystem, str]:
    from pyarrow.fs import FileSystem

    return cast("tuple[FileSystem, str]", FileSystem.from_uri(address))


def open_file(file: DataFile) -> Any:
    """The file as it is stored, for Arrow's readers."""
    import pyarrow as pa

    if not is_address(file.place):
        return pa.OSFile(file.place)
    store, path = _store(file.place)
    return store.open_input_file(path)


@contextmanager
def open_bytes(file: DataFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed where its name ends in .gz or .zst. Raises DataError when they cannot be read."""
    import pyarrow as pa

    try:
        with ExitStack() as stack:
            raw: Any
            if is_address(file.place):
                raw = stack.enter_context(io.BufferedReader(open_file(file)))
            else:
                raw = stack.enter_context(open(file.place, "rb"))
            name = file.name.lower()
            if name.endswith(".gz"):
                raw = stack.enter_context(gzip.open(raw, "rb"))
            elif name.endswith(".zst"):
                raw = stack.enter_context(io.BufferedReader(pa.input_stream(raw, compression="zstd")))
            yield cast(IO[bytes], raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error


def iter_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without a byte order mark) of the lines that are not blank; of `rows` these alone."""
    with open_bytes(file) as lines:
        found = ((place, line) for place, line in enumerate(lines, start=1) if line.strip())
        for place, line in islice(found, *(file.rows or (None,))):
            yield place, line.removeprefix(b"\xef\xbb\xbf")
