"""Verification: is every byte and row of a log what was committed?

Checks of each file of a version: it is there with the committed size and CRC-32; it is Parquet with this log's columns and the
committed number of rows; its rows keep the invariants of `Records`, belong to this run and are in the committed rounds; their
numbers are finite. Over all files: each (round, sample_id) is there once. Also lists Parquet files that are not in the table.
A damaged file is reported and the rest still checked. Called by `tc-ray log verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
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
    unchecked: list[str] = field(default_factory=list)
    """Files committed without a CRC-32 (by another tool): well-formed, but perhaps altered."""
    twice: int = 0
    """Rows whose (round, sample_id) another row has."""
    not_finite: int = 0
    """Rows with a NaN or an infinity: as committed, but nothing can be learned from them."""
    orphans: list[str] = field(default_factory=list)
    """Parquet files in the folder that are not in this version: of writers that died, waiting for vacuum, or foreign. No reader
    sees them."""
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
                f"BAD {self.not_finite:,} rows hold numbers that are not finite: the Copilot and statistics leave them out"
            )
        lines += [f"no CRC-32 (not committed by tc-ray): {name}" for name in self.unchecked]
        for when, taken in (("quarantined earlier", self.quarantined_before), ("quarantined", self.quarantined)):
            for line in taken:
                lost = f"{line.rows} rows of rounds {line.round_min} to {line.round_max} are lost"
                lines.append(f"{when} {line.name}: {lost} ({line.reason})")
        if self.orphans:
            lines.append(
                f"{len(self.orphans)} Parquet files beside the table, which no reader sees (`tc-ray log vacuum` removes ours)"
            )
        lines.append(
            f"{len(self.bad)} of {self.files} files are bad" if self.bad else "every file is what was committed"
        )
        return lines

    def to_dict(self) -> dict[str, object]:
        """JSON-ready."""
        return {
            "location": self.location,
            "version": self.version,
            "files": self.files,
            "rows": self.rows,
            "bytes": self.bytes,
            "good": self.good,
            "bad": [{"name": error.name, "reason": error.reason} for error in self.bad],
            "unchecked": self.unchecked,
            "twice": self.twice,
            "not_finite": self.not_finite,
            "orphans": self.orphans,
            "quarantined": [asdict(line) for line in self.quarantined],
            "quarantined_before": [asdict(line) for line in self.quarantined_before],
        }


def check_file(store: LogStore, file: StoredFile) -> tuple[pa.Table, int]:
    """Rows of one file after all checks, and how many of them hold a NaN or an infinity.

    Raises:
        BadFileError: the first thing that is wrong with it.
        OSError: the location cannot be read just now.
    """
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


def verify(store: LogStore, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Check the version that `store` is at; changes nothing.

    Args:
        progress: called with the number of files checked, and of all.
    """
    files = store.files()
    result = Verification(str(store.location), store.version, len(files))
    keys = []
    for number, file in enumerate(files, 1):
        try:
            rows, not_finite = check_file(store, file)
        except BadFileError as error:
            result.bad.append(error)
        else:
            result.rows += rows.num_rows
            result.not_finite += not_finite
            result.bytes += file.bytes
            keys.append(np.stack([rows.column(name).to_numpy() for name in ("round", "sample_id")], axis=1))
            if file.crc32 is None:
                result.unchecked.append(file.name)
        progress(number, len(files))
    if keys:
        every = np.concatenate(keys)
        result.twice = len(every) - len(np.unique(every, axis=0))
    known = {file.name for file in files}
    result.orphans = sorted(
        entry.name
        for entry in store.location.list(recursive=False)
        if entry.name.endswith((".parquet", ".parquet.tmp")) and entry.name not in known
    )
    result.quarantined_before = quarantined(store.location)
    return result


def verify_log(
    location: str | Path | Location,
    *,
    version: int | None = None,
    quarantine: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Check a log, also one that a run is writing.

    Args:
        version: of the table; default: the newest.
        quarantine: take damaged files out of the log (newest version only, and only while no run writes it).

    Raises:
        LeaseHeldError: `quarantine`, and a run or another command is at work on the log.
        LogSchemaError: no Mistake Log there.
        ValueError: `quarantine` with an older version.
    """
    place = Location(location)
    if not quarantine:
        store = LogStore(place, version)
        reading = held(store, version)
        try:
            return verify(store, progress)
        finally:
            reading.release()
    if version is not None:
        raise ValueError("quarantine changes the newest version only: leave out the version")
    with RunLease.take(place, "tc-ray log verify") as lease:
        store = LogStore(place, lease=lease.number)
        result = verify(store, progress)
        result.quarantined = set_aside(store, result.bad, numbers={})
        return result
