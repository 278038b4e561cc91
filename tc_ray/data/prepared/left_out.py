"""How many rows are missing from a held-out part and why; stored in the part's Parquet file.

Invariant: rows measured + rows left out = records of the part. Written by `prepare`, shown by the evaluation's report.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_KEY = b"tc-ray.left_out"


@dataclass(frozen=True)
class LeftOut:
    """Rows left out of a part.

    before_split: the part is cut from the training data, and the counts are those of that data before the cut.
    not_measured: rows beyond fusion.max_validation_rows or max_test_rows.
    """

    prompt_too_long: int = 0
    bad: int = 0
    not_measured: int = 0
    before_split: bool = False

    def measured(self, rows: int, limit: int | None) -> LeftOut:
        """Also counting those of `rows` beyond `limit`."""
        return self if limit is None else replace(self, not_measured=max(0, rows - limit))

    def given(self, rows: int) -> int:
        """Rows of the part if none of its own were missing."""
        return rows + self.not_measured + (0 if self.before_split else self.prompt_too_long + self.bad)

    def counted(self, rows: int, part: str) -> str:
        """`rows` with what is missing and why: "3 of 6 test rows (3 left out: ...)"."""
        given = self.given(rows)
        text = f"{rows} of {given} {part} rows" if given > rows else f"{rows} {part} rows"
        left_out = [
            (self.prompt_too_long, "with a prompt longer than data.cutoff_tokens"),
            (self.bad, "bad, see quarantine.jsonl"),
        ]
        missing = []
        if total := self.prompt_too_long + self.bad:
            when = " of all rows before the split" if self.before_split else ""
            reasons = ", ".join(f"{count} {reason}" for count, reason in left_out if count)
            missing.append(f"{total} left out{when}: {reasons}")
        if self.not_measured:
            missing.append(f"{self.not_measured} not measured: fusion.max_{part}_rows")
        return text + (f" ({'; '.join(missing)})" if missing else "")


def with_left_out(table: pa.Table, left_out: LeftOut) -> pa.Table:
    """The table with the counts in its metadata."""
    return table.replace_schema_metadata({_KEY: json.dumps(asdict(left_out)).encode()})


def read_left_out(file: Path) -> LeftOut:
    """Counts of a prepared Parquet file; zeros where it has no such metadata."""
    kept = (pq.read_schema(file).metadata or {}).get(_KEY)
    return LeftOut(**json.loads(kept)) if kept else LeftOut()
