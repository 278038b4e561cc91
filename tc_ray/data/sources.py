"""Find data files and read their records one by one, each with its place.

Invariant: a record that cannot be read comes out as a `BadRow` in its place and never ends the reading; a file that
cannot be read at all raises DataError. `find_files` runs in the driver, `iter_records` in Ray Data tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tc_ray.data.errors import DataError

EXAMPLE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
SEQUENCE_SUFFIXES = (".txt",)
_HELD_OUT = ("test", "valid", "val", "dev")


@dataclass(frozen=True)
class BadRow:
    """What is wrong with one record: the field ('' for the whole record), the problem and the remedy."""

    field: str
    problem: str
    fix: str


@dataclass(frozen=True)
class Record:
    """One record: `place` counts from 1 in `unit` (line of JSONL, item of a JSON array, row of Parquet)."""

    place: int
    unit: str
    raw: str
    value: Any


def find_files(source: str, suffixes: Sequence[str] = EXAMPLE_SUFFIXES) -> list[Path]:
    """Absolute paths of the data files that `source` (file or folder) names, sorted; empty when it is absent.

    Raises DataError for a file of another kind, and for a folder that mixes training and held-out files.
    """
    path = Path(source).expanduser().absolute()
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise DataError(f"{path}: unknown kind of file; convert it to one of {', '.join(suffixes)}")
        return [path]
    if not path.is_dir():
        return []
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.suffix.lower() in suffixes
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )
    held_out = [file for file in files if file.stem.lower().startswith(_HELD_OUT)]
    if held_out and len(held_out) < len(files):
        raise DataError(
            f"folder {path} holds {held_out[0].name} beside other files, and all of them would be read as one set; "
            f"name the file (for instance {next(f for f in files if f not in held_out)}), or move them apart"
        )
    return files


def source_files(source: str, format: str) -> list[Path]:
    """`find_files` for data of this format (data.format)."""
    return find_files(source, SEQUENCE_SUFFIXES if format == "sequences" else EXAMPLE_SUFFIXES)


def iter_records(path: Path) -> Iterator[Record]:
    """Yield the records of one file in order; `value` is the parsed JSON value, or a BadRow."""
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet(path)
        elif path.suffix.lower() == ".json" and _starts_with_bracket(path):
            yield from _json_array(path)
        else:
            yield from _json_lines(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _json_lines(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for place, line in enumerate(file, start=1):
            if not line.strip():
                continue
            raw = line.decode("utf-8-sig", errors="replace").rstrip("\r\n")
            value: Any
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                value = BadRow("", f"not UTF-8 at byte {error.start + 1}", "save the file as UTF-8")
            except json.JSONDecodeError as error:
                value = BadRow("", f"not JSON: {error.msg} at column {error.colno}", "write one JSON object a line")
            except RecursionError:
                value = BadRow("", "nested too deeply", "write one flat JSON object a line")
            yield Record(place, "line", raw, value)


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[Record]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); repair the array, "
            f"or write one JSON object a line so that single bad lines can be left out"
        ) from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON in UTF-8: {error}") from error
    for place, value in enumerate(values, start=1):
        yield Record(place, "item", json.dumps(value, ensure_ascii=False), value)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        place = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                place += 1
                yield Record(place, "row", json.dumps(value, ensure_ascii=False, default=str), value)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error
