"""Files torn in every way that a power cut, a full disk or a stranger can leave them in."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

FOLDER = b"(a folder in its place)"
"""Stands for a folder where the file was."""


def torn_forms(content: bytes, cuts: int = 5) -> dict[str, bytes]:
    """Name -> bytes: cut at `cuts` lengths, zeros and garbage of the same length, and other JSON than expected."""
    size = len(content)
    lengths = [size // 2, 1, size // 4, size * 3 // 4, max(0, size - 3)][:cuts]
    return {
        "empty": b"",
        **{f"cut after {length}": content[:length] for length in sorted({*lengths} - {0})},
        "zeros": b"\0" * size,
        "zeros at the end": content[: size // 2] + b"\0" * (size - size // 2),
        "garbage": random.Random(size).randbytes(size),
        "null": b"null",
        "list": b"[]",
        "object": b"{}",
        "text": b'"text"\n',
        "deep": b"[" * 100_000,
        "number of 5000 digits": b'{"round": ' + b"9" * 5000 + b"}",
        "folder": FOLDER,
    }


_watched: list[set[Path]] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | Path):
        for files in _watched:
            files.add(Path(arguments[0]).absolute())


@cache
def _hook() -> None:
    sys.addaudithook(_watch)  # for good: Python knows no way to take one off


def files_opened(read: Callable[[], object]) -> set[Path]:
    """Absolute paths of the files that Python opens in this process, threads too, while `read` runs."""
    files: set[Path] = set()
    _hook()
    _watched.append(files)
    try:
        read()
    finally:
        _watched.remove(files)
    return files


@contextlib.contextmanager
def torn(path: Path, form: bytes) -> Iterator[None]:
    """The file holds `form` for a while."""
    content = path.read_bytes()
    path.unlink()
    path.mkdir() if form is FOLDER else path.write_bytes(form)
    try:
        yield
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(content)
