"""Rows taken out of a log into JSON lines that a person can read. (Other programs read the Delta table itself.)

Invariant: what stands under the name that the user gave is complete: it is written beside it and renamed at the end, and
nothing that exists is replaced. Files of the log are read one at a time. Called by `tc-ray log export`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tc_ray.files import sync
from tc_ray.inspection.rows import stream
from tc_ray.inspection.samples import OTHERS, Visit, visits_in
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog


class ExportError(ValueError):
    """The export cannot be made as asked; the message says what to change."""


def export_jsonl(log: MistakeLog, out: Path, texts: TokenTexts, rounds: tuple[int, int] | None = None) -> int:
    """One JSON object per row, see `as_line`; returns their number. Rows with a NaN or an infinity are left out, and counted in
    `log.not_finite`.

    Args:
        rounds: first and last round, both included; None: all.

    Raises:
        ExportError: `out` exists, or a file of the log is damaged: an export that lacks rows would look whole.
    """
    if out.exists():
        raise ExportError(f"{out} exists already: choose another name, or remove it")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    written = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for rows in stream(log, rounds, others=OTHERS):
                written += len(rows)
                for visit in visits_in(rows):
                    line = {"run": log.metadata.run, **as_line(visit, texts)}
                    file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
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
    return written


def as_line(visit: Visit, texts: TokenTexts) -> dict[str, Any]:
    """A visit as JSON values. tokens: one object per target token; `instead`: the likeliest others."""
    return {
        "round": visit.round,
        "sample_id": visit.sample_id,
        "seen": visit.seen,
        "loss": visit.mean_loss,
        "wrong": visit.wrong,
        "prompt": texts.sequence(visit.prompt.tolist()),
        "answer": texts.sequence(visit.truth.tolist()),
        "input_ids": [*visit.prompt.tolist(), *visit.truth.tolist()],
        "target_start": len(visit.prompt),
        "tokens": [
            {
                "id": token,
                "text": texts.raw(token),
                "p": visit.p_true(place),
                "error": float(visit.error[place]),
                "loss": float(visit.loss[place]),
                "correct": bool(visit.correct[place]),
                "instead": [{"id": other, "text": texts.raw(other), "p": p} for other, p in visit.likely(place)],
            }
            for place, token in enumerate(visit.truth.tolist())
        ],
    }
