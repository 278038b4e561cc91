"""Read the records of a data file one by one, each with its place.

Invariant: a record that cannot be read comes out as a `BadRow` in its place and does not end the reading. A file that
cannot be read at all raises DataError. Called in Ray's tasks by `encode`, and by plans.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tc_ray.data.source.errors import DataError
from tc_ray.text import first_line

_RAW_CHARS = 500
LONGEST_INTEGER = 4300
"""Digits of the longest integer that Python reads by default."""
ONE_OBJECT = "write one JSON object per line, or a list of them"


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


class DoubledKeys(dict[str, Any]):
    """An object in which a key stands twice; the last one counts, as in `json`."""


@dataclass(frozen=True)
class LongInteger:
    """A number of more than LONGEST_INTEGER digits; it is an error only in a field that is read."""

    digits: int


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
            value = _parse(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            value = not_utf8(error)
        except json.JSONDecodeError as error:
            value = BadRow("", f"not JSON: {error.msg} at column {error.colno}", ONE_OBJECT)
        except RecursionError:
            value = BadRow("", "nested too deeply", "write one flat JSON object per line")
        yield Record(place, "line", line.decode("utf-8", errors="replace").rstrip("\r\n"), value)


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """A line that is not UTF-8."""
    return BadRow("", f"not UTF-8 at byte {error.start + 1}", "save the file as UTF-8")


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_int=_integer)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else DoubledKeys(found)


def _integer(text: str) -> int | LongInteger:
    digits = len(text.lstrip("-"))
    return int(text) if digits <= LONGEST_INTEGER else LongInteger(digits)


def _starts_with_bracket(path: Path) -> bool:
    with open_bytes(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_array(path: Path) -> Iterator[Record]:
    with open_bytes(path) as file:
        # bytes that are not UTF-8 become lone surrogates, so only their own record is refused
        text = file.read().decode("utf-8-sig", errors="surrogateescape")
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); repair the array, "
            f"or write one JSON object per line so that single bad lines can be left out"
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{path}: a record is nested too deeply; write one JSON object per line so that it alone is left out"
        ) from error
    for place, value in enumerate(values, start=1):
        yield Record(place, "item", _shown(value), value)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        place = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in _rows(batch):
                place += 1
                yield Record(place, "row", "" if isinstance(value, BadRow) else _shown(value), value)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _rows(batch: Any) -> list[Any]:
    """Rows of a record batch as dicts; one that Python cannot hold (invalid UTF-8, a date out of range) as a BadRow."""
    try:
        return list(batch.to_pylist())
    except Exception:  # noqa: BLE001 - any error: the row that causes it is looked for
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except Exception as whole:  # noqa: BLE001
        for name, column in zip(row.schema.names, row.columns, strict=True):
            try:
                column.to_pylist()
            except UnicodeDecodeError as error:
                return BadRow(name, f"is not valid UTF-8 at byte {error.start + 1}", "write the text as UTF-8")
            except Exception as error:  # noqa: BLE001
                return BadRow(name, *_unreadable(error))
        return BadRow("", *_unreadable(whole))


def _unreadable(error: Exception) -> tuple[str, str]:
    """Problem and fix."""
    return f"cannot be read: {type(error).__name__}: {first_line(error)}", "write it as text or a number"


def _shown(value: Any) -> str:
    """The record for people, in the quarantine file."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):
        return "(cannot be shown)"
