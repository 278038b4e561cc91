"""Rows taken out of a log into one file: Parquet without the table around it, or JSON lines that a person can read.

Invariant: what stands under the name that the user gave is complete: it is written beside it and renamed at the end, and
nothing that exists is replaced. Files of the log are read one at a time. Called by `tc-ray log export`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.files import finite, sync
from tc_ray.inspection.rows import COLUMNS, UNKNOWN, Rows, decode
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.schema import ROW_SCHEMA, LogMetadata

_NUMBERS = ("attempt", "round", "rank", "sample_id", "seen", "target_start")
_STATES = ("states", "states_first")
FIELDS = (
    *("run", "attempt", "round", "rank", "sample_id", "seen", "loss", "wrong", "prompt", "answer", "input_ids"),
    *("target_start", "tokens", *_STATES),
)
"""Fields of a JSON line. tokens: one object per target token (id, text, p, error, loss, correct, and `instead`: the likeliest
others with id, text, p). states: [positions][layers][dim] numbers, the first of position `states_first`; with --states."""
OTHERS = 3
_ROWS = 512


class ExportError(ValueError):
    """The export cannot be made as asked; the message says what to change."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    rows: int
    bytes: int
    not_finite: int = 0
    """Rows with a NaN or an infinity, which JSON does not have: null stands for each. (In Parquet they stay, uncounted.)"""


def export_parquet(
    log: MistakeLog, out: Path, rounds: tuple[int, int] | None = None, columns: Sequence[str] | None = None
) -> Export:
    """Rows as they are. The table's metadata (widths, tokenizer hash, ...) is in the file's schema, so it can be read by itself.

    Args:
        rounds: first and last round, both included; None: all. columns: of the row schema; None: all.

    Raises:
        ExportError: `out` exists, a column is unknown, or a file of the log is damaged.
    """
    _check_names(columns, ROW_SCHEMA.names)
    names = ROW_SCHEMA.names if columns is None else list(columns)
    metadata = log.metadata.to_configuration()
    schema = pa.schema([ROW_SCHEMA.field(name) for name in names], metadata=metadata)
    rows = 0
    with _beside(log, out) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for _, table in log.tables(rounds, names):
            writer.write_table(table.replace_schema_metadata(metadata))
            rows += table.num_rows
    return Export(rows, out.stat().st_size)


def export_jsonl(
    log: MistakeLog,
    out: Path,
    texts: TokenTexts,
    rounds: tuple[int, int] | None = None,
    columns: Sequence[str] | None = None,
    *,
    states: bool = False,
) -> Export:
    """One JSON object per row, with texts; see `FIELDS`.

    Args:
        rounds: first and last round, both included; None: all. columns: fields; None: all (states only with `states`).
        states: hidden states as lists of numbers.

    Raises:
        ExportError: `out` exists, a field is unknown or needs `states`, or a file of the log is damaged.
    """
    _check_names(columns, FIELDS)
    if columns is not None and not states and set(columns) & set(_STATES):
        raise ExportError("--columns states: give --states too (they are large)")
    fields = [name for name in FIELDS if (columns is None or name in columns) and (states or name not in _STATES)]
    read = [*COLUMNS, "rationale"] if set(fields) & set(_STATES) else COLUMNS
    rows = not_finite = 0
    with _beside(log, out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for _, table in log.tables(rounds, read):
            for first in range(0, table.num_rows, _ROWS):
                piece = table.slice(first, _ROWS)
                decoded = decode(piece, log.metadata, others=OTHERS)
                rows, not_finite = rows + len(decoded), not_finite + int((~decoded.finite).sum())
                for line in _lines(log.metadata, piece, decoded, texts, fields):
                    file.write(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n")
    return Export(rows, out.stat().st_size, not_finite)


def _lines(
    metadata: LogMetadata, table: pa.Table, rows: Rows, texts: TokenTexts, fields: Sequence[str]
) -> Iterator[dict[str, Any]]:
    wrong = rows.sums(~rows.correct)
    for i in range(len(rows)):
        first, last = int(rows.target_offsets[i]), int(rows.target_offsets[i + 1])
        ids = rows.input_ids[int(rows.seq_offsets[i]) : int(rows.seq_offsets[i + 1])].tolist()
        start = int(rows.target_start[i])
        line: dict[str, Any] = {name: int(getattr(rows, name)[i]) for name in _NUMBERS}
        line["run"], line["input_ids"], line["wrong"] = metadata.run, ids, int(wrong[i])
        # not `Rows.sums`: a NaN in one row would spoil the sums of all later ones
        line["loss"] = float(rows.loss[first:last].mean(dtype=np.float64)) if last > first else None
        if "prompt" in fields:
            line["prompt"] = texts.sequence(ids[:start])
        if "answer" in fields:
            line["answer"] = texts.sequence(ids[start:])
        if "tokens" in fields:
            line["tokens"] = [_token(rows, place, texts) for place in range(first, last)]
        if set(fields) & set(_STATES):
            bits = np.frombuffer(table["rationale"][i].as_py(), np.uint16).astype(np.uint32) << 16  # bf16
            states = bits.view(np.float32).reshape(-1, metadata.rationale_layers, metadata.rationale_dim)
            line["states"], line["states_first"] = states.tolist(), len(ids) - 1 - len(states)
        yield {name: line[name] for name in fields}


def _token(rows: Rows, place: int, texts: TokenTexts) -> dict[str, Any]:
    truth = int(rows.truth[place])
    others = zip(rows.others[place].tolist(), rows.p_others[place].tolist(), strict=True)
    return {
        "id": truth,
        "text": texts.raw(truth),
        "p": float(np.exp(-rows.loss[place].astype(np.float64))),
        "error": float(rows.error[place]),
        "loss": float(rows.loss[place]),
        "correct": bool(rows.correct[place]),
        "instead": [{"id": token, "text": texts.raw(token), "p": p} for token, p in others if token != UNKNOWN],
    }


def _check_names(asked: Sequence[str] | None, known: Sequence[str]) -> None:
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise ExportError(f"--columns: {', '.join(unknown)} is none of {', '.join(known)}")


@contextlib.contextmanager
def _beside(log: MistakeLog, out: Path) -> Iterator[Path]:
    """A temporary name beside `out`, which it gets at the end.

    Raises:
        ExportError: `out` exists, or a file of the log is damaged: an export that lacks rows would look whole.
    """
    if out.exists():
        raise ExportError(f"{out} exists already: choose another name, or remove it")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        yield temporary
        if log.bad_files:
            names = ", ".join(str(bad) for bad in log.bad_files[:3])
            raise ExportError(
                f"{len(log.bad_files)} files of the log are damaged ({names}): nothing was exported; "
                "tc-ray log verify --quarantine takes them out of the log"
            )
        sync(temporary)
        temporary.rename(out)
        sync(out.absolute().parent)
    finally:
        temporary.unlink(missing_ok=True)
