"""Quarantine: damaged files leave the table for a folder aside, with a line that says why and what was lost.

Invariant: at each moment a damaged file is in the table, or in the list `_tc_ray/quarantine/quarantine.jsonl`, or both. First the
line is written, then one commit removes the file from the table, then the file is moved. A crash in between leaves a file that
vacuum removes, or a line that a repetition does not write again.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore

QUARANTINE_FOLDER = "_tc_ray/quarantine"
_LIST = f"{QUARANTINE_FOLDER}/quarantine.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quarantined:
    """A damaged file that left the log."""

    name: str
    reason: str
    rows: int
    """Lost with it."""
    round_min: int
    round_max: int
    time: str
    """ISO 8601, UTC."""

    def __str__(self) -> str:
        return f"{self.name}: {self.rows} rows of rounds {self.round_min} to {self.round_max} are lost ({self.reason})"


def set_aside(store: LogStore, bad: Sequence[BadFileError], *, numbers: Mapping[str, int]) -> list[Quarantined]:
    """Take damaged files out of the table and move them aside. Returns what was taken out.

    Args:
        store: at the newest version.
        bad: as found; files that are no longer in the table are skipped.
        numbers: of the commit; errors too are those of `LogStore.commit`.
    """
    store.confirm()  # before anything is written: the list may belong to a new owner of the log
    files = {file.name: file for file in store.files()}
    found = [(files[error.name], error) for error in bad if error.name in files]
    if not found:
        return []
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    taken = [
        Quarantined(file.name, error.reason, file.rows, file.round_min, file.round_max, now) for file, error in found
    ]
    before = quarantined(store.location)
    known = {line.name for line in before}
    lines = [*before, *(line for line in taken if line.name not in known)]
    store.location.write(_LIST, "".join(json.dumps(line.__dict__) + "\n" for line in lines).encode())
    store.commit(remove=[file for file, _ in found], numbers=numbers, note={"kind": "quarantine"})
    for line in taken:
        _move(store.location, line.name)
        log.warning("%s: taken out of the log: %s", store.location, line)
    return taken


def quarantined(location: Location) -> list[Quarantined]:
    """All files that ever left a log this way, oldest first."""
    try:
        content = location.read(_LIST)
    except FileNotFoundError:
        return []
    return [Quarantined(**json.loads(line)) for line in content.decode().splitlines() if line.strip()]


def _move(location: Location, name: str) -> None:
    aside = f"{QUARANTINE_FOLDER}/{name}"
    with contextlib.suppress(FileNotFoundError):  # a file that is missing is damaged too
        if location.local is not None:
            location.path(aside).parent.mkdir(parents=True, exist_ok=True)
            location.rename(name, aside)
        else:
            location.write(aside, location.read(name))
            location.delete(name)
