"""Read the records of a data file one by one, each with its place.

Invariant: a line that cannot be read comes out as a `BadRow` in its place and does not end the reading. A JSON array or a
Parquet file that cannot be read raises DataError. Called in Ray's tasks by `encode`, and by plans.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from tc_ray.files import DamagedFileError
from tc_ray.text import first_line

if TYPE_CHECKING:
    import pyarrow as pa

_RAW_CHARS = 500
ONE_OBJECT = "write one JSON object per line, or a list of them"


class DataError(ValueError):
    """Training data cannot be used; the message names file, place and field, and what to do."""


@dataclass(frozen=True)
class BadRow:
    """What is wrong with one record: the field ('' for the whole record), the problem and how to fix it."""

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


def quarantined(record: Record, bad: BadRow) -> dict[str, Any]:
    """A bad record as the quarantine file lists it (there with its file); what is not Unicode as escapes."""
    texts = {"field": bad.field, "problem": bad.problem, "fix": bad.fix, "raw": record.raw[:_RAW_CHARS]}
    valid = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()}
    return {"unit": record.unit, "place": record.place, **valid}


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed where its name ends in .gz. Raises DataError when they cannot be read."""
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without a byte order mark) of the lines that are not blank."""
    with open_bytes(path) as lines:
        for place, line in enumerate(lines, start=1):
            if line.strip():
                yield place, line.removeprefix(b"\xef\xbb\xbf")


def iter_records(path: Path) -> Iterator[Record]:
    """Yield the records of one file in order; `value` is the parsed JSON value, or a BadRow."""
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    return _json_array(path) if suffix == ".json" and _starts_with_bracket(path) else _json_lines(path)


def _json_lines(path: Path) -> Iterator[Record]:
    for place, line in iter_lines(path):
        value: Any
        try:
            value = json.loads(line.decode("utf-8"))  # of bytes json would guess the encoding, line by line
        except UnicodeDecodeError as error:
            value = not_utf8(error)
        except json.JSONDecodeError as error:
            value = BadRow("", f"not JSON: {error.msg} at column {error.colno}", ONE_OBJECT)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, nested too deeply
            value = BadRow("", f"cannot be read: {first_line(error)}", "write one flat JSON object per line")
        yield Record(place, "line", line.decode("utf-8", errors="replace").rstrip("\r\n"), value)


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """A line that is not UTF-8."""
    return BadRow("", f"not UTF-8 at byte {error.start + 1}", "save the file as UTF-8")


def _starts_with_bracket(path: Path) -> bool:
    with open_bytes(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[Record]:
    with open_bytes(path) as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({first_line(error)}); repair the array, or write one JSON object per line so that single bad "
            "lines can be left out"
        ) from error
    for place, value in enumerate(values, start=1):
        yield Record(place, "item", _shown(value), value)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                place += 1
                yield Record(place, "row", _shown(value), value)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # also what Python cannot hold of a value
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)}); write it again") from error


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def read_prepared(file: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of a Parquet file that a run has prepared.

    Raises DamagedFileError: it is absent, not a whole Parquet file, or has other columns; the message says what to do.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=list(columns), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(
            f"{file} is damaged or absent ({first_line(error)}): `tc-ray train` with the same recipe prepares it anew"
        ) from error
