"""The encoded rows of train, validation and test, and the quarantine file of what is left out of them.

Invariant: every bad record of a source is in the quarantine file once, and a source with too many of them stops the run
before its rows are used. Called by `prepare`; Ray must be running.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tc_ray.data.encode.encode import Encoded, Encoder, encode_files
from tc_ray.data.source.errors import DataError
from tc_ray.data.source.find import PARTS
from tc_ray.data.source.records import iter_records
from tc_ray.data.source.sequences import SequenceReader, label_items, read_items, scan, write_items
from tc_ray.text import visible

_SHOWN_BAD_ROWS = 5


def examples(
    sources: Mapping[str, Sequence[Path]], encoder: Encoder, quarantine: Path
) -> tuple[dict[str, Encoded], int]:
    """Rows of the parts that have files of their own (the others are cut from train later), and the number of bad records."""
    encoded = {
        part: encode_files(files, encoder, iter_records, held_out=part != "train")
        for part, files in sources.items()
        if files
    }
    bad = _leave_out({part: (rows.bad, rows.records) for part, rows in encoded.items()}, encoder, quarantine)
    return encoded, bad


def sequences(
    files: Sequence[Path], encoder: Encoder, quarantine: Path, items: Path, *, test_only: bool, notes: list[str]
) -> tuple[dict[str, Encoded], int]:
    """Rows of all parts, leave-one-out, and the number of bad lines. The items get labels, which are written to `items`.

    test_only: test rows alone, with the labels that an earlier run has written to `items`.
    """
    known = read_items(items) if test_only else None
    parts = ("test",) if test_only else PARTS
    found = scan(files, known)
    bad = _leave_out({parts[0]: (found.bad, found.records)}, encoder, quarantine)
    labels = known or label_items(found.items, encoder.seed)
    if known is None:
        write_items(labels, items)
        notes.append(
            f"{found.users} users, {len(labels)} items with random numbers of {len(next(iter(labels.values()), ''))} "
            f"digits (in {items.name}); of each user the last item is a test row, the one before it a validation row"
        )
    encoded = {}
    for part in parts:
        read = SequenceReader(part, labels, found.left_out, encoder.config.sequences)
        encoded[part] = encode_files(files, encoder, read, held_out=part != "train")
        if part != "train":
            encoded[part].bad = found.bad  # each user is one row of this part
    return encoded, bad


def _leave_out(bad: Mapping[str, tuple[list[dict[str, Any]], int]], encoder: Encoder, quarantine: Path) -> int:
    """Write the bad rows of all sources; returns their number.

    Raises:
        DataError: a source has too many of them among its records.
    """
    with quarantine.open("w", encoding="utf-8") as file:
        for rows, _ in bad.values():
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    allowed = encoder.config.max_bad_fraction
    for name, (rows, records) in bad.items():
        # rounded up to whole rows: a single bad row among few does not stop a run
        if len(rows) > math.ceil(allowed * records) or (rows and len(rows) == records):
            first = "\n".join(
                f"  {row['file']}, {row['unit']} {row['place']}{', field ' + row['field'] if row['field'] else ''}: "
                f"{row['problem']}; {row['fix']}"
                for row in rows[:_SHOWN_BAD_ROWS]
            )
            raise DataError(
                f"data.{name}: {len(rows)} of {records} rows are bad, more than data.max_bad_fraction "
                f"{allowed:g} allows, or none is left. The first:\n{visible(first)}\nAll of them: {quarantine}"
            )
    return sum(len(rows) for rows, _ in bad.values())
