"""What waits for the record writer's thread, and the exact count of what was dropped instead.

Invariant: every record that comes in leaves through `pop` or is counted under its round in `drops`. The queue stays small: the
writer limits the micro-batches. Not thread-safe: the writer shares it under its lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tc_ray.mistakelog.rows.records import Records


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    round: int
    records: Records
    wait: Callable[[], object] | None = None
    """Returns when the arrays that come from a device have their values; None: they have them."""


@dataclass(frozen=True)
class Cut:
    """`round` has ended; cut a file now if `force`, else when the limits say so."""

    round: int
    force: bool


class WriteQueue:
    """Micro-batches and ends of rounds, in order."""

    def __init__(self) -> None:
        self._entries: deque[Batch | Cut] = deque()
        self._drops: dict[int, int] = {}
        self.left_out: set[int] = set()
        """Rounds that took no step: their records will not be in the log."""
        self.depth = 0
        """Micro-batches waiting."""
        self.dropped = 0
        """Records dropped so far."""
        self.not_finite = 0
        """Of those, records with a NaN or an infinity, and all of a round that took no step because of one."""

    def __bool__(self) -> bool:
        return bool(self._entries)

    def push(self, batch: Batch) -> None:
        self._entries.append(batch)
        self.depth += 1

    def end_round(self, cut: Cut) -> None:
        """Append the end of a round, or let it take the place of the one before if no rows came between."""
        if self._entries and isinstance(last := self._entries[-1], Cut):
            cut = Cut(cut.round, cut.force or last.force)
            self._entries.pop()
        self._entries.append(cut)

    def pop(self) -> Batch | Cut | None:
        """The oldest entry; None: empty."""
        entry = self._entries.popleft() if self._entries else None
        if isinstance(entry, Batch):
            self.depth -= 1
        return entry

    def drop(self, round: int, count: int, *, not_finite: bool = False) -> None:
        """Count records that will not be in the log."""
        if count:
            self._drops[round] = self._drops.get(round, 0) + count
            self.dropped += count
            self.not_finite += count if not_finite else 0

    def without_left_out(self, batches: Iterable[Batch]) -> list[Batch]:
        """The batches that have rows, of rounds that are not left out; the records of the others are counted as dropped."""
        kept = []
        for batch in batches:
            if batch.round in self.left_out:
                self.drop(batch.round, len(batch.records), not_finite=True)
            elif len(batch.records):
                kept.append(batch)
        return kept

    def take_drops(self, last: int) -> dict[int, int]:
        """Counts by round, of rounds up to `last`, that no earlier call gave."""
        taken = {round: count for round, count in sorted(self._drops.items()) if round <= last}
        self._drops = {round: count for round, count in self._drops.items() if round > last}
        return taken
