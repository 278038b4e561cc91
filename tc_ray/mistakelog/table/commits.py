"""What the table's commits hold beside Delta's own actions: CRC-32 of files, coverage, dropped records, notes.

Invariant: commit files are never changed and, in a Mistake Log, never expire, so each is read once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.location import Location

LOG_FOLDER = "_delta_log"
_REMOTE_READERS = 16
_FILE_FIELDS = {item.name for item in fields(DataFile)}


def commit_name(version: int) -> str:
    """Name of a commit file within the table."""
    return f"{LOG_FOLDER}/{version:020d}.json"


@dataclass(frozen=True)
class Commit:
    """One table version, as this package reads it."""

    version: int
    files: list[DataFile] = field(default_factory=list)
    """Added files and bare coverage."""
    removed: list[str] = field(default_factory=list)
    """Files that left the table."""
    note: dict[str, Any] = field(default_factory=dict)


class Fate(NamedTuple):
    """What the commits say about one file."""

    crc32: int
    left: int | None = None
    """The version with which it left the table: no later version has it, since names are not used twice. None: it did not."""


class CommitLog:
    """Commits of one table, read as far as needed. Only the fates of files are kept."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._read = -1
        self._fates: dict[str, Fate] = {}

    def commits(self, version: int) -> list[Commit]:
        """Commits 0..version, oldest first, read anew."""
        return list(self._load(range(version + 1)))

    def fates(self, version: int) -> dict[str, Fate]:
        """Of all files of versions up to this one (and perhaps later ones)."""
        for commit in self._load(range(self._read + 1, version + 1)):
            for file in commit.files:
                if file.name is not None:
                    self._fates[file.name] = Fate(file.crc32)
            for name in commit.removed:
                if name in self._fates:
                    self._fates[name] = self._fates[name]._replace(left=commit.version)
            self._read = commit.version
        return self._fates

    def _load(self, versions: range) -> Iterator[Commit]:
        if self._location.local is not None or len(versions) < 2:
            yield from map(self._parse, versions)
            return
        with ThreadPoolExecutor(_REMOTE_READERS) as pool:
            yield from pool.map(self._parse, versions)

    def _parse(self, version: int) -> Commit:
        return parse_commit(version, self._location.read(commit_name(version)))


def parse_commit(version: int, content: bytes) -> Commit:
    """A commit from its file's content.

    Raises ValueError: not a whole Delta commit.
    """
    commit = Commit(version)
    actions = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    if not actions:
        raise ValueError("empty")
    for action in actions:
        if (info := action.get("commitInfo")) is not None:
            ours = dict(info.get("tc_ray") or {})
            for file in ours.pop("files", []):
                # keys of a later tc-ray are no damage: `repair` would move the commit aside
                known = {key: value for key, value in file.items() if key in _FILE_FIELDS}
                dropped = {int(round): count for round, count in known.get("dropped", {}).items()}
                commit.files.append(DataFile(**{**known, "dropped": dropped}))
            commit.note.update(ours)
        elif (gone := action.get("remove")) is not None:
            commit.removed.append(gone["path"])
    return commit


def dropped_records(commits: list[Commit]) -> dict[int, dict[int, int]]:
    """Records that are not in the log: rank -> round -> count. A fence (note `watermark`) takes back the later rounds' counts."""
    dropped: dict[int, dict[int, int]] = {}
    for commit in commits:
        if (watermark := commit.note.get("watermark")) is not None:
            dropped = {
                rank: {number: count for number, count in rounds.items() if number <= watermark}
                for rank, rounds in dropped.items()
            }
        for file in commit.files:
            if file.dropped and file.sequence >= 0:
                dropped.setdefault(file.rank, {}).update(file.dropped)
    return dropped
