"""Rows taken out of a log: Parquet files without the table around them, or JSON lines that a person can read.

Invariant: what stands under the name that the user gave is complete: it is written beside it and renamed at the end, and
nothing that is there already is replaced. Files of the log are read one at a time. Called by `tc-ray log export`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.files import sync, sync_tree
from tc_ray.inspection.rows import COLUMNS, UNKNOWN, Array, Rows, decode
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.schema import ROW_SCHEMA

FIELDS = (
    "run",
    "attempt",
    "round",
    "rank",
    "sample_id",
    "seen",
    "loss",
    "wrong",
    "prompt",
    "answer",
    "input_ids",
    "target_start",
    "tokens",
    "states",
    "states_first",
)
"""Fields of a JSON line. tokens: one object a target token (id, text, p, error, loss, correct, and `instead`: the likeliest
others with id, text, p). states: [positions][layers][dim] numbers, the first of position `states_first`; with --states."""
OTHERS = 3
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_STATES = ("states", "states_first")
_ROWS = 512


class ExportError(ValueError):
    """The export cannot be made as asked; the message says what to change."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    rows: int
    files: int
    bytes: int
    not_finite: int = 0
    """Rows with a NaN or an infinity, which JSON cannot say: null stands for each. (In Parquet they stay, uncounted.)"""


def export_parquet(
    log: MistakeLog, out: Path, rounds: tuple[int, int] | None = None, columns: Sequence[str] | None = None
) -> Export:
    """Rows as they are: one file, if `out` ends in .parquet, else a folder with one for each file of the log.

    The files carry the table's metadata (widths, tokenizer hash, ...) in their schema, so each can be read by itself.

    Args:
        rounds: first and last round, both included; None: all. columns: of the row schema; None: all.

    Raises:
        ExportError: `out` is there already, a column is unknown, or a file of the log is damaged.
    """
    _check_names(columns, ROW_SCHEMA.names)
    names = ROW_SCHEMA.names if columns is None else list(columns)
    metadata = log.metadata.to_configuration()
    schema = pa.schema([ROW_SCHEMA.field(name) for name in names], metadata=metadata)
    single = out.suffix == ".parquet"
    temporary = _beside(out)
    try:
        rows = files = 0
        if not single:
            temporary.mkdir(parents=True)
        writer = pq.ParquetWriter(temporary, schema) if single else None
        for _, table in log.tables(rounds, names):
            if table.num_rows == 0:
                continue
            table = table.replace_schema_metadata(metadata)
            if writer is not None:
                writer.write_table(table)
            else:
                pq.write_table(table, temporary / f"part-{files:05d}.parquet")
            rows, files = rows + table.num_rows, files + 1
        if writer is not None:
            writer.close()
            files = 1
        elif files == 0:
            pq.write_table(schema.empty_table(), temporary / "part-00000.parquet")
            files = 1
        _refuse_gaps(log)
        return _finish(temporary, out, rows, files)
    finally:
        _discard(temporary)


def export_jsonl(
    log: MistakeLog,
    out: Path,
    texts: TokenTexts,
    rounds: tuple[int, int] | None = None,
    columns: Sequence[str] | None = None,
    *,
    states: bool = False,
) -> Export:
    """One JSON object a row, with texts; see `FIELDS`. `out` is a file, or a folder that gets rows.jsonl.

    Args:
        rounds: first and last round, both included; None: all. columns: fields; None: all (states only with `states`).
        states: hidden states as lists of numbers.

    Raises:
        ExportError: `out` is there already, a field is unknown or needs `states`, or a file of the log is damaged.
    """
    _check_names(columns, FIELDS)
    if columns is not None and not states and set(columns) & set(_STATES):
        raise ExportError("--columns states: give --states too (they are large)")
    fields = [name for name in FIELDS if (columns is None or name in columns) and (states or name not in _STATES)]
    # tables() gives COLUMNS only of ROW_SCHEMA: states need their own column
    read = [*COLUMNS, "rationale"] if set(fields) & set(_STATES) else COLUMNS
    folder = out.suffix not in JSON_SUFFIXES
    temporary = _beside(out)
    try:
        if folder:
            temporary.mkdir(parents=True)
        rows = not_finite = 0
        with (temporary / "rows.jsonl" if folder else temporary).open("w", encoding="utf-8") as file:
            for _, table in log.tables(rounds, read):
                for batch in table.to_batches(max_chunksize=_ROWS):
                    decoded = decode(batch, log.metadata, others=OTHERS)
                    rows, not_finite = rows + len(decoded), not_finite + int((~decoded.finite).sum())
                    for line in _objects(log, batch, decoded, texts, fields):
                        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        _refuse_gaps(log)
        return dataclasses.replace(_finish(temporary, out, rows, 1), not_finite=not_finite)
    finally:
        _discard(temporary)


def _objects(
    log: MistakeLog, batch: pa.RecordBatch, rows: Rows, texts: TokenTexts, fields: Sequence[str]
) -> Iterator[dict[str, Any]]:
    wrong = rows.sums(~rows.correct)
    for i in range(len(rows)):
        part = slice(int(rows.target_offsets[i]), int(rows.target_offsets[i + 1]))
        ids = rows.input_ids[int(rows.seq_offsets[i]) : int(rows.seq_offsets[i + 1])].tolist()
        start, count = int(rows.target_start[i]), part.stop - part.start
        line: dict[str, Any] = {
            "run": log.metadata.run,
            "attempt": int(rows.attempt[i]),
            "round": int(rows.round[i]),
            "rank": int(rows.rank[i]),
            "sample_id": int(rows.sample_id[i]),
            "seen": int(rows.seen[i]),
            "loss": _number(rows.loss[part].sum(dtype=np.float64) / count) if count else None,
            "wrong": int(wrong[i]),
            "input_ids": ids,
            "target_start": start,
        }
        if "prompt" in fields:
            line["prompt"] = texts.sequence(ids[:start])
        if "answer" in fields:
            line["answer"] = texts.sequence(ids[start:])
        if "tokens" in fields:
            line["tokens"] = [_token(rows, place, texts) for place in range(part.start, part.stop)]
        if "states" in fields or "states_first" in fields:
            stored = _states(batch.column("rationale")[i], log.metadata.rationale_layers, log.metadata.rationale_dim)
            states = stored.astype(object)
            states[~np.isfinite(stored)] = None
            line["states"], line["states_first"] = states.tolist(), len(ids) - 1 - len(stored)
        yield {name: line[name] for name in fields}


def _token(rows: Rows, place: int, texts: TokenTexts) -> dict[str, Any]:
    others = [
        {"id": int(token), "text": texts.raw(int(token)), "p": _number(p)}
        for token, p in zip(rows.others[place], rows.p_others[place], strict=True)
        if token != UNKNOWN
    ]
    truth = int(rows.truth[place])
    return {
        "id": truth,
        "text": texts.raw(truth),
        "p": _number(np.exp(-rows.loss[place].astype(np.float64))),
        "error": _number(rows.error[place]),
        "loss": _number(rows.loss[place]),
        "correct": bool(rows.correct[place]),
        "instead": others,
    }


def _number(value: float) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def _states(cell: pa.Scalar, layers: int, dim: int) -> Array:
    """float32 [positions, layers, dim] of a cell of bf16 bits."""
    bits = np.frombuffer(cell.as_py(), np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(-1, layers, dim)


def _check_names(asked: Sequence[str] | None, known: Sequence[str]) -> None:
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise ExportError(f"--columns: {', '.join(unknown)} is none of {', '.join(known)}")


def _refuse_gaps(log: MistakeLog) -> None:
    """An export that lacks rows would look whole."""
    if log.bad_files:
        names = ", ".join(str(bad) for bad in log.bad_files[:3])
        raise ExportError(
            f"{len(log.bad_files)} files of the log are damaged ({names}): nothing was exported; "
            "tc-ray log verify --quarantine takes them out of the log"
        )


def _beside(out: Path) -> Path:
    if out.exists():
        raise ExportError(f"{out} is there already: choose another name, or remove it")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return out.with_name(f".{out.name}.{os.getpid()}")


def _finish(temporary: Path, out: Path, rows: int, files: int) -> Export:
    written = [temporary] if temporary.is_file() else sorted(temporary.iterdir())
    size = sum(file.stat().st_size for file in written)
    if temporary.is_dir():
        sync_tree(temporary)
    else:
        sync(temporary)
    temporary.rename(out)
    sync(out.absolute().parent)
    return Export(rows, files, size)


def _discard(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)
