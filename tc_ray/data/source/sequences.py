"""Item sequences of users: read and checked, items labelled, leave-one-out rows made from them.

One line per user: user id, then item ids in time order, separated by blanks. The last item is the test target, the one
before it the validation target; each earlier item but the first is the target of a training row. A row's prompt is the labels
of at most `history` items before its target. Invariant: no row of a part contains a target of a later part.
`scan` runs in the driver (labels need all items), `SequenceReader` in Ray's tasks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.config.data import SequencesSection
from tc_ray.data.source.files import DataFile, iter_lines
from tc_ray.data.source.records import BadRow, DataError, Record, not_utf8, quarantined, read_prepared

ITEMS_FILE = "items.parquet"
"""The items of a run and their labels, in its data folder."""
FEWEST_ITEMS = 3
"""One to predict from, one validation and one test target."""


@dataclass(frozen=True)
class Sequences:
    """What `scan` found: different items, sorted; users; bad lines, as rows for the quarantine and by (file, line)."""

    items: list[str]
    users: int
    bad: list[dict[str, Any]]
    left_out: frozenset[tuple[str, int]]

    @property
    def records(self) -> int:
        """Lines read, bad ones included."""
        return self.users + len(self.bad)


def scan(files: Sequence[DataFile]) -> Sequences:
    """Read all lines once and check them. Raises DataError: a file cannot be read."""
    items: set[str] = set()
    first_place: dict[str, str] = {}
    bad: list[dict[str, Any]] = []
    left_out = set()
    for file in files:
        for place, line in iter_lines(file):
            found = _parse(line)
            if not isinstance(found, BadRow) and found[0] in first_place:
                problem = f"user {found[0]} stands already in {first_place[found[0]]}"
                found = BadRow("user", problem, "join the two lines in time order")
            if isinstance(found, BadRow):
                record = Record(place, "line", line.decode("utf-8", errors="replace").rstrip("\r\n"), found)
                bad.append({"file": str(file), **quarantined(record, found)})
                left_out.add((str(file), place))
                continue
            first_place[found[0]] = f"{file}, line {place}"
            items.update(found[1])
    return Sequences(sorted(items), len(first_place), bad, frozenset(left_out))


def label_items(items: Sequence[str], seed: int) -> dict[str, str]:
    """Item id -> label: the numbers 0 .. items - 1 in seeded random order, all of one even number of digits.

    Labels carry no information about their items (the paper: items as random numeric ids). With an even number of digits a
    tokenizer that takes digits in pairs gives every item the same number of tokens.
    """
    width = max(2, len(str(len(items) - 1)))
    width += width % 2
    numbers = list(range(len(items)))
    random.Random(seed).shuffle(numbers)
    return {item: f"{number:0{width}d}" for item, number in zip(items, numbers, strict=True)}


@dataclass(frozen=True)
class SequenceReader:
    """The rows of one part ("train", "validation" or "test") of a file, as records with prompt, completion and answer.

    left_out: bad lines, which `scan` has reported.
    """

    part: str
    labels: Mapping[str, str]
    left_out: frozenset[tuple[str, int]]
    config: SequencesSection

    def __call__(self, file: DataFile) -> Iterator[Record]:
        """Yield the records of `file` in order; the place of a record is its user's line."""
        for place, line in iter_lines(file):
            found = None if (str(file), place) in self.left_out else _parse(line)
            if found is None or isinstance(found, BadRow):
                continue
            user, items = found
            for target in self._targets(len(items)):
                before = items[max(0, target - self.config.history) : target]
                label = self.labels[items[target]]
                prompt = " ".join(self.labels[item] for item in before)
                value = {"prompt": prompt, "completion": label, "answer": label}
                yield Record(place, "line", f"{user}: {prompt} -> {label}", value)

    def _targets(self, items: int) -> range:
        """Places in a user's sequence that are this part's targets."""
        if self.part == "train":
            limit = self.config.rows_per_user
            return range(1 if limit is None else max(1, items - 2 - limit), items - 2)
        last = items - (1 if self.part == "test" else 2)
        return range(last, last + 1)


def write_items(labels: Mapping[str, str], path: Path) -> None:
    """Write one row per item, sorted by label; columns `item` (id as in the data) and `label`."""
    rows = sorted(labels.items(), key=lambda pair: pair[1])
    pq.write_table(pa.table({"item": [item for item, _ in rows], "label": [label for _, label in rows]}), path)


def read_items(path: Path) -> dict[str, str]:
    """Item id -> label, from the file of `write_items`. Raises DataError when it is absent."""
    if not path.is_file():
        raise DataError(f"{path} is absent: the run was not prepared from item sequences (data.format: sequences)")
    table = read_prepared(path, ["item", "label"])
    return dict(zip(table["item"].to_pylist(), table["label"].to_pylist(), strict=True))


def _parse(line: bytes) -> tuple[str, list[str]] | BadRow:
    try:
        user, *items = line.decode("utf-8").split()
    except UnicodeDecodeError as error:
        return not_utf8(error)
    if len(items) < FEWEST_ITEMS:
        return BadRow("items", f"user {user} has {len(items)} items", f"give at least {FEWEST_ITEMS}, or drop the user")
    return user, items
