"""One hash for each part of a run's prepared data, by which a restart with other rows is refused.

Invariant: it follows from the rows and their order alone: not from the Parquet files' bytes, which change with a library's
version, nor from where or when the rows were read. Called by the driver, before any worker starts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.data.source.find import PARTS

_TRAINED = ("sample_id", "target_start", "input_ids")
_MEASURED = (*_TRAINED, "prompt", "completion", "answer")


def rows_hashes(folder: Path) -> dict[str, str]:
    """16 hex digits by part: train, validation, test.

    Training rows count with what is trained on (ids, targets, sample ids), held-out rows with their texts too.
    """
    return {part: _hash(folder / f"{part}.parquet", _TRAINED if part == "train" else _MEASURED) for part in PARTS}


def _hash(file: Path, columns: tuple[str, ...]) -> str:
    # one digest per column: the result does not depend on how rows are divided into batches
    digests = {name: (hashlib.sha256(), hashlib.sha256()) for name in columns}
    rows = 0
    for batch in pq.ParquetFile(file).iter_batches(columns=list(columns)):
        rows += batch.num_rows
        for name, (lengths, values) in digests.items():
            column = batch.column(batch.schema.get_field_index(name))
            if pa.types.is_list(column.type):
                lengths.update(_integers(column.value_lengths()))
                values.update(_integers(column.flatten()))
            elif pa.types.is_integer(column.type):
                values.update(_integers(column))
            else:
                values.update("".join(json.dumps(text) + "\n" for text in column.to_pylist()).encode())
    parts = [[name, lengths.hexdigest(), values.hexdigest()] for name, (lengths, values) in digests.items()]
    return hashlib.sha256(json.dumps([rows, parts]).encode()).hexdigest()[:16]


def _integers(values: pa.Array) -> bytes:
    return bytes(values.to_numpy(zero_copy_only=False).astype("<i8").tobytes())
