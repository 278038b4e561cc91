"""A record of a data file with its place, what is wrong with a bad one, and the one error of data.

Invariant: a message about a record names its file, its place there, the field and what to do. Pure; `readers` makes records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tc_ray.files import DamagedFileError
from tc_ray.text import first_line, visible

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
    """One record: `place` counts from 1 in `unit` (line of JSONL or CSV, item of a JSON array, row of Parquet)."""

    place: int
    unit: str
    raw: str
    value: Any


def quarantined(record: Record, bad: BadRow) -> dict[str, Any]:
    """A bad record as the quarantine file lists it (there with its file); what is not Unicode as escapes."""
    texts = {"field": bad.field, "problem": bad.problem, "fix": bad.fix, "raw": record.raw[:_RAW_CHARS]}
    valid = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()}
    return {"unit": record.unit, "place": record.place, **valid}


def not_utf8(error: UnicodeDecodeError) -> BadRow:
    """A line that is not UTF-8."""
    return BadRow("", f"not UTF-8 at byte {error.start + 1}", "save the file as UTF-8")


def bad_row_text(row: Mapping[str, Any]) -> str:
    """A quarantined row for people: file, place, field, what is wrong and what to do."""
    field = f", field {row['field']}" if row["field"] else ""
    return visible(f"{row['file']}, {row['unit']} {row['place']}{field}: {row['problem']}; {row['fix']}")


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
