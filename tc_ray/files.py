"""Small files and folders that survive a power cut: written aside, synced, renamed into place.

Invariant: a reader sees the old content or the new one, never a part, also after a power cut. A folder is whole when its
marker, written last, names every file in it with its size. The whole package writes small files and publishes folders on a
local disk through this module; the Mistake Log's files go through `mistakelog.table.location`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from tc_ray.text import first_line

_Kind = TypeVar("_Kind")
FOLDER_MARKER = "complete.json"
"""File in a published folder: {"files": {name: bytes}}."""


def write_file(path: Path, content: str | bytes) -> None:
    """Write or replace a file, atomically and durably.

    Raises OSError: it could not be written; the old file, if any, is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # with process and thread, so that two writers of one file do not share the temporary one
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.writing")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, document: Any, *, indent: int | None = 2) -> None:
    """Write or replace a JSON file, atomically and durably; numbers that are not finite are refused (ValueError)."""
    # ASCII can hold file names that are not valid Unicode, and cannot steer a terminal that shows the file
    write_file(path, json.dumps(document, indent=indent, allow_nan=False) + "\n")


class DamagedFileError(ValueError):
    """A small file is cut off, overwritten, or a folder in its place. The message names it."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises FileNotFoundError: there is no such file. DamagedFileError: it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise DamagedFileError(f"{path} is a folder where a file should be") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: not valid JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged: it holds no JSON object")
    return content


def typed(document: Any, kind: type[_Kind], path: Path) -> _Kind:
    """A document read from `path` as a dataclass or pydantic model. Raises DamagedFileError if fields or types differ."""
    try:
        # as JSON, since a strict check of Python objects would want them to be of `kind` already
        return TypeAdapter(kind).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise DamagedFileError(f"{path} is damaged: {where}: {problem['msg']}") from None


def finite(document: Any) -> Any:
    """The same JSON tree with null for numbers that JSON does not have (NaN, infinities)."""
    if isinstance(document, dict):
        return {key: finite(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def publish_folder(temporary: Path, folder: Path, **more: Any) -> None:
    """Give a folder that was written under another name its final one: sync it, mark it as whole, rename it.

    It replaces an older folder of that name. A crash leaves the old folder, the new one, or neither; then `temporary` is whole.
    more: other keys of the marker.
    """
    mark_whole(temporary, **more)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    sync(folder.parent)


def mark_whole(folder: Path, **more: Any) -> None:
    """Sync every file below the folder, then write its marker. more: other keys of the marker."""
    (folder / FOLDER_MARKER).unlink(missing_ok=True)
    sync_tree(folder)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / FOLDER_MARKER, {**more, "files": sizes})


def is_whole(folder: Path) -> bool:
    """Whether the folder has its marker, and every file that it names has its size. A damaged marker counts as none."""
    try:
        sizes = read_json(folder / FOLDER_MARKER)["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_whole(root: Path, prefix: str, kind: type[_Kind]) -> tuple[list[_Kind], list[str]]:
    """The whole folders `root/PREFIX-NUMBER`, oldest first, each as `kind` from `folder` and the keys of its marker.

    Also the faults of damaged ones that are newer than all of these. A folder without a marker is still being written.
    """
    whole: list[_Kind] = []
    damaged: list[str] = []
    for folder in _numbered(root, prefix):
        marker = folder / FOLDER_MARKER
        try:
            found = typed(read_json(marker) | {"folder": str(folder)}, kind, marker)
            if not is_whole(folder):
                raise DamagedFileError(
                    f"{folder} is damaged: it lacks files or parts of files that its {marker.name} names"
                )
        except (DamagedFileError, OSError) as error:
            damaged.append(str(error))
        else:
            whole.append(found)
            damaged = []
    return whole, damaged


def remove_before(folder: Path, spared: Collection[Path] = ()) -> None:
    """Remove the marked folders beside `folder`, PREFIX-NUMBER, with a smaller number, but for those spared."""
    for old in _numbered(folder.parent, folder.name.partition("-")[0]):
        if old == folder:
            return
        if old in spared:
            continue
        (old / FOLDER_MARKER).unlink()  # first, so that a half-removed folder does not count
        shutil.rmtree(old)


def _numbered(root: Path, prefix: str) -> list[Path]:
    """By number, because a seventh digit sorts before six."""
    folders = [marker.parent for marker in root.glob(f"{prefix}-*/{FOLDER_MARKER}")]
    numbered = [folder for folder in folders if folder.name[len(prefix) + 1 :].isdecimal()]
    return sorted(numbered, key=lambda folder: int(folder.name[len(prefix) + 1 :]))


def sync(path: Path) -> None:
    """Flush a file that another library wrote, or a folder's entries: without that a power cut can undo a rename.

    An error is final: the system may have dropped the data, and a second call would succeed without it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folders themselves, before it is renamed or marked."""
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another worker's temporary file
            sync(path)
    sync(folder)


def disk_time(folder: Path) -> float:
    """Unix seconds now, by the clock that stamps files in a folder: on a share the file server's. Needs no space.

    Raises OSError: the folder may not be written.
    """
    os.utime(folder)
    return folder.stat().st_mtime
