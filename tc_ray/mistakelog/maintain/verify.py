"""Verification: is every byte and row of a log what was committed?

Checks of each file of a version: it is there with the committed size and CRC-32; it is Parquet with this log's columns and the
committed number of rows; its rows keep the invariants of `Records`, belong to this run and are in the committed rounds; their
numbers are finite. Over all files: each (round, sample_id) is there once. A damaged file is reported and the rest still checked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from tc_ray.mistakelog.maintain.quarantine import Quarantined, quarantined, set_aside
from tc_ray.mistakelog.read.reader_lease import held
from tc_ray.mistakelog.rows.finite import only_finite
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore, StoredFile


@dataclass
class Verification:
    """What was found."""

    location: str
    version: int
    files: int = 0
    rows: int = 0
    bytes: int = 0
    bad: list[BadFileError] = field(default_factory=list)
    """Damaged files of the table, each with the first thing that is wrong with it."""
    twice: int = 0
    """Rows whose (round, sample_id) another row has."""
    not_finite: int = 0
    """Rows with a NaN or an infinity: as committed, but nothing can be learned from them."""
    quarantined: list[Quarantined] = field(default_factory=list)
    """Taken out of the table now."""
    quarantined_before: list[Quarantined] = field(default_factory=list)
    """Taken out earlier, by a run or by this command."""

    @property
    def good(self) -> bool:
        """No fault in what readers see."""
        return not self.bad and not self.twice and not self.not_finite

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [
            f"{self.location}, version {self.version}: {self.files} files, {self.rows:,} rows, {self.bytes:,} bytes checked"
        ]
        lines += [f"BAD {error.name}: {error.reason}" for error in self.bad]
        if self.twice:
            lines.append(f"BAD {self.twice} rows have the round and sample of another row")
        if self.not_finite:
            lines.append(
                f"BAD {self.not_finite:,} rows hold numbers that are not finite: statistics leave them out, the Copilot a step with them"
            )
        lines += [f"quarantined earlier {line}" for line in self.quarantined_before]
        lines += [f"quarantined {line}" for line in self.quarantined]
        lines.append(
            f"{len(self.bad)} of {self.files} files are bad" if self.bad else "every file is what was committed"
        )
        return lines


def check_file(store: LogStore, file: StoredFile) -> tuple[pa.Table, int]:
    """Rows of one file after all checks, and how many of them hold a NaN or an infinity. Raises BadFileError."""
    rows = store.read(file)  # size, CRC-32, Parquet, columns, number of rows
    if not rows.num_rows:
        return rows, 0
    runs = rows.column("run").unique().to_pylist()
    if runs != [store.metadata.run]:
        raise BadFileError(file.name, f"rows of run {runs}, this is the log of {store.metadata.run!r}")
    try:
        records = Records.from_arrow(rows, store.metadata.to_configuration())
        records.validate()
    except (LogSchemaError, ValueError) as error:
        raise BadFileError(file.name, f"invalid rows: {error}") from None
    if records.round.min() < file.round_min or records.round.max() > file.round_max:
        raise BadFileError(
            file.name,
            f"rounds {records.round.min()} to {records.round.max()}, committed as {file.round_min} to {file.round_max}",
        )
    return rows, only_finite(records)[1]


def verify(store: LogStore) -> Verification:
    """Check the version that `store` is at; changes nothing."""
    files = store.files()
    result = Verification(str(store.location), store.version, len(files))
    keys = []
    for file in files:
        try:
            rows, not_finite = check_file(store, file)
        except BadFileError as error:
            result.bad.append(error)
        else:
            result.rows += rows.num_rows
            result.not_finite += not_finite
            result.bytes += file.bytes
            keys.append(np.stack([rows.column(name).to_numpy() for name in ("round", "sample_id")], axis=1))
    if keys:
        every = np.concatenate(keys)
        result.twice = len(every) - len(np.unique(every, axis=0))
    result.quarantined_before = quarantined(store.location)
    return result


def verify_log(location: str | Path | Location, *, quarantine: bool = False) -> Verification:
    """Check a log, also one that a run is writing.

    Args:
        quarantine: take damaged files out of the log. Raises LeaseHeldError if a run, or another command, is at work on it.
    """
    place = Location(location)
    if not quarantine:
        store = LogStore(place)
        reading = held(store)
        try:
            return verify(store)
        finally:
            reading.release()
    with RunLease.take(place, "tc-ray log verify") as lease:
        store = LogStore(place, lease=lease.number)
        result = verify(store)
        result.quarantined = set_aside(store, result.bad, numbers={})
        return result
