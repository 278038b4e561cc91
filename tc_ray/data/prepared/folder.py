"""A run's data folder as others see it: its files, its counts, and whether what stands there can be kept.

Invariant: data.json is written last, over files that are on the disk, and removed first, so a folder with a data.json is
whole. Its fingerprint covers the data section, the seed, the tokenizer, and size and time of every file read. A torn folder
counts as none. Written by `prepare`; `rows_hashes` is called by the driver before any worker starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tc_ray.data.encode.encode import Encoder
from tc_ray.data.source.embedded import generated_set
from tc_ray.data.source.find import PARTS
from tc_ray.data.source.records import DataError
from tc_ray.files import DamagedFileError, read_json, sync_tree, typed, write_json

FORMAT = 3
SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_start", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
    ]
)
"""Columns of train, validation and test.parquet. sample_id: the row's index in its file."""
_TRAINED = ["sample_id", "target_start", "input_ids"]
RECORD = "data.json"
QUARANTINE = "quarantine.jsonl"
"""The bad rows, each with file, place, field, problem and fix."""


@dataclass
class PreparedData:
    """What a data folder holds. Counts are by part: train, validation, test.

    records: read from each source, bad ones included. largest_id: the largest token id of all rows.
    """

    folder: Path
    source: str
    rows: dict[str, int]
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    longest: dict[str, int]
    quarantined: int
    too_long: int
    cut_completions: int
    records: dict[str, int]
    largest_id: int
    notes: list[str] = field(default_factory=list)
    reused: bool = False

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
        lines = [f"data: {self.source}" + (" (as prepared before)" if self.reused else ""), *self.notes]
        lines += [
            f"{part}: {self.rows[part]} rows, {self.tokens[part]} tokens, {self.target_tokens[part]} of them targets, "
            f"longest {self.longest[part]}"
            for part in PARTS
        ]
        if self.quarantined:
            lines.append(f"left out as bad: {self.quarantined} rows, listed in {self.folder / QUARANTINE}")
        if self.too_long:
            lines.append(f"left out because the prompt is longer than data.cutoff_tokens: {self.too_long} rows")
        if self.cut_completions:
            lines.append(f"completions cut at data.cutoff_tokens: {self.cut_completions}")
        return lines


def fingerprint(encoder: Encoder, sources: Mapping[str, Sequence[Path]]) -> str:
    """A hash of everything that the rows follow from."""
    from tc_ray.models.identity import tokenizer_hash

    files = [
        [part, str(path), path.stat().st_size, path.stat().st_mtime_ns]
        for part, paths in sources.items()
        for path in paths
    ]
    settings = [encoder.config.model_dump(mode="json"), encoder.seed, encoder.encoder_decoder]
    parts = [FORMAT, settings, files, tokenizer_hash(encoder.tokenizer), generated_set(encoder.config)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def rows_hashes(folder: Path) -> dict[str, str]:
    """16 hex digits by part: train, validation, test. A restart with other rows is refused by them.

    They follow from the rows and their order alone, not from the Parquet files' bytes, which change with a library's version.
    Training rows count with what is trained on (ids, targets, sample ids), held-out rows with their texts too.
    """
    texts = ["prompt", "completion", "answer"]
    return {
        part: _hash(pq.read_table(folder / f"{part}.parquet", columns=_TRAINED + (texts if part != "train" else [])))
        for part in PARTS
    }


def _hash(rows: pa.Table) -> str:
    found = hashlib.sha256(str(rows.num_rows).encode())
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        found.update(name.encode())
        if pa.types.is_string(column.type):
            found.update("".join(json.dumps(text) + "\n" for text in column.to_pylist()).encode())
            continue
        if pa.types.is_list(column.type):
            found.update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
            column = pc.list_flatten(column)
        found.update(column.to_numpy().astype("<i8").tobytes())
    return found.hexdigest()[:16]


def save(prepared: PreparedData, of: str) -> None:
    """Mark the folder as whole, made from the inputs of a fingerprint."""
    sync_tree(prepared.folder)
    fields = {key: value for key, value in asdict(prepared).items() if key not in ("folder", "reused")}
    write_json(prepared.folder / RECORD, {"fingerprint": of, "format": FORMAT, **fields})


def load(folder: Path, of: str) -> PreparedData | None:
    """What `folder` holds, if it was made from the inputs of this fingerprint and is whole."""
    record = folder / RECORD
    try:
        kept = read_json(record)
        if kept.pop("fingerprint", None) != of or kept.pop("format", None) != FORMAT:
            return None
        prepared = replace(typed({**kept, "folder": str(folder)}, PreparedData, record), reused=True)
        whole = all(pq.read_metadata(folder / f"{part}.parquet").num_rows == prepared.rows[part] for part in PARTS)
    except (OSError, DamagedFileError, KeyError, pa.ArrowException):
        return None
    return prepared if whole else None
