"""A run's data folder as others see it: its files, its counts, and the hashes of its rows.

Written by `prepare`; `rows_hashes` is called by the driver before any worker starts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tc_ray.data.encode.conversations import EARLIER
from tc_ray.data.source.find import PARTS
from tc_ray.data.source.records import DataError
from tc_ray.files import sync_tree, write_json

SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_start", pa.int32()),
        (EARLIER, pa.list_(pa.int32())),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("options", pa.list_(pa.string())),
        ("set", pa.string()),
    ]
)
"""Columns of train, validation and test.parquet. sample_id: the row's index in its file; where rows have several targets, the number
of the row's first one. earlier_targets: see `encode.conversations`. options: completions to choose from. set: name of the held-out
set; null in train.parquet."""
_TRAINED = ["sample_id", "target_start", "input_ids"]
RECORD = "data.json"
LEFT_OUT = b"tc-ray.left_out"
"""Key of the Parquet metadata of a held-out part: a `LeftOut` of each set, as JSON."""
QUARANTINE = "quarantine.jsonl"
"""The bad rows, each with file, place, field, problem and fix."""


@dataclass(frozen=True)
class LeftOut:
    """Rows of a held-out set's own files that are missing from it; stored in the part's Parquet file, shown by the report.

    not_measured: rows beyond fusion.max_validation_rows or max_test_rows.
    """

    prompt_too_long: int = 0
    bad: int = 0
    not_measured: int = 0

    @classmethod
    def read(cls, file: Path, limit: int | None) -> dict[str, LeftOut]:
        """Counts of each set of a prepared Parquet file, of which `limit` rows each are measured."""
        kept = json.loads((pq.read_metadata(file).metadata or {}).get(LEFT_OUT, "{}"))
        rows = Counter(pq.read_table(file, columns=["set"])["set"].to_pylist())
        return {
            name: cls(**kept.get(name, {}) | {"not_measured": 0 if limit is None else max(0, count - limit)})
            for name, count in rows.items()
        }

    def given(self, rows: int) -> int:
        """Rows of the part if none were missing."""
        return rows + self.prompt_too_long + self.bad + self.not_measured

    def counted(self, rows: int, part: str) -> str:
        """`rows` with what is missing and why: "3 of 6 test rows (3 bad, see quarantine.jsonl)"."""
        reasons = [
            (self.prompt_too_long, "with a prompt longer than data.cutoff_tokens"),
            (self.bad, "bad, see quarantine.jsonl"),
            (self.not_measured, f"not measured: fusion.max_{part}_rows"),
        ]
        missing = ", ".join(f"{count} {reason}" for count, reason in reasons if count)
        return f"{rows} of {self.given(rows)} {part} rows ({missing})" if missing else f"{rows} {part} rows"


@dataclass
class PreparedData:
    """What a data folder holds. Counts are by part: train, validation, test.

    records: read from each source, bad ones included. long_turns: later answers of conversations, left out as too long.
    """

    folder: Path
    source: str
    rows: dict[str, int]
    quarantined: int
    too_long: int
    cut_completions: int
    records: dict[str, int]
    notes: list[str] = field(default_factory=list)
    long_turns: int = 0

    def file(self, part: str) -> Path:
        """Parquet file of a part's rows; without test data that of the test rows is empty."""
        return self.folder / f"{part}.parquet"

    def check_rounds(self, batch_size: int) -> None:
        """Raise DataError, with the counts of the parts, when the training rows do not fill one round."""
        if self.rows["train"] < batch_size:
            raise DataError(
                f"{self.rows['train']} training rows cannot fill a round of pilot.batch_size {batch_size}: of "
                f"{sum(self.records.values())} records {self.quarantined} are bad, {self.too_long} have a prompt longer "
                f"than data.cutoff_tokens, {self.rows['validation']} are validation and {self.rows['test']} test rows; "
                "lower pilot.batch_size or give more data"
            )

    def describe(self) -> list[str]:
        """Lines for people: source, counts, and everything that was left out."""
        lines = [f"data: {self.source}", *self.notes]
        lines.append(", ".join(f"{self.rows[part]} {part} rows" for part in PARTS))
        if self.quarantined:
            lines.append(f"left out as bad: {self.quarantined} rows, listed in {self.folder / QUARANTINE}")
        if self.too_long or self.cut_completions:
            left_out = f"left out because the prompt is longer than data.cutoff_tokens: {self.too_long} rows"
            lines.append(f"{left_out}; completions cut there: {self.cut_completions}")
        if self.long_turns:
            lines.append(
                f"left out because the messages before them are longer than data.cutoff_tokens: {self.long_turns} later "
                "assistant messages"
            )
        return lines


def rows_hashes(folder: Path) -> dict[str, str]:
    """16 hex digits by part: train, validation, test. A restart with other rows is refused by them.

    They follow from the rows and their order alone, not from the Parquet files' bytes, which change with a library's version.
    Training rows count with what is trained on (ids, targets, sample ids), held-out rows with their texts too.
    """
    texts = ["prompt", "completion", "answer", "options", "set"]
    return {
        part: _hash(
            pq.read_table(folder / f"{part}.parquet", columns=_TRAINED + ([EARLIER] if part == "train" else texts))
        )
        for part in PARTS
    }


def _hash(rows: pa.Table) -> str:
    if EARLIER in rows.column_names and rows[EARLIER].null_count == rows.num_rows:
        rows = rows.drop_columns(EARLIER)  # rows of one target each count as they did before there were others
    found = hashlib.sha256(str(rows.num_rows).encode())
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        found.update(name.encode())
        if pa.types.is_string(column.type) or name == "options":
            found.update("".join(json.dumps(text) + "\n" for text in column.to_pylist()).encode())
            continue
        if pa.types.is_list(column.type):
            found.update(pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype("<i8").tobytes())
            column = pc.list_flatten(column)
        found.update(column.to_numpy().astype("<i8").tobytes())
    return found.hexdigest()[:16]


def save(prepared: PreparedData) -> None:
    """Put the files on the disk, and write data.json: what was prepared, for people and tests."""
    sync_tree(prepared.folder)
    fields = {key: value for key, value in asdict(prepared).items() if key != "folder"}
    write_json(prepared.folder / RECORD, fields)
