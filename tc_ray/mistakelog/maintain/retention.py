"""Retention: which files leave a log that has grown past its limits. A pure policy; maintenance carries it out.

Whole files leave, oldest rounds first. Whatever the limits say, a file stays while it holds

- a round that the Copilot has not consumed, or one of the `buffer_rounds` before its position: a restarted Copilot reads those
  again to fill its buffer. (Its checkpoint may be older than its position, but the buffer holds the newest rounds of the log.)
- a round after `safe_round`, that of the Pilot's newest checkpoint: it may still be fenced and written again.

`max_bytes` bounds the bytes on the disk. Files that left the table stay there for `vacuum_grace_seconds`, then as long as a reader
holds their version. So bytes are reserved for them: as many as were written in the last two grace times, because in a steady state
as many leave as are written. (Counting the waiting files themselves would remove more and more: each removal makes more files
wait.) With the headroom for what is written next, at most half of the limit is reserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tc_ray.mistakelog.table.store import StoredFile


@dataclass(frozen=True)
class Standing:
    """How far the run is, and what is on the disk."""

    safe_round: int
    """Last round that no restart of the Pilot takes back."""
    copilot_round: int | None
    """Last round consumed by the Copilot; None: there is no Copilot."""
    buffer_rounds: int
    """Rounds that the Copilot draws from."""
    recent_bytes: int = 0
    """Written to the table's folder in the last two `vacuum_grace_seconds`."""
    headroom_bytes: int = 0
    """That may be written before the next call: a file of each rank, a merge."""
    disk_bytes: int = 0
    """All data files in the table's folder, also those that wait for removal."""


@dataclass(frozen=True)
class Retirement:
    """The policy's answer."""

    files: list[StoredFile]
    """To be removed from the table, oldest first."""
    unmet: str | None
    """Why a limit is not kept now; None: all are."""


def retire(
    files: Sequence[StoredFile], standing: Standing, *, keep_rounds: int | None, max_bytes: int | None
) -> Retirement:
    """Choose the files to remove.

    Args:
        files: of the table, in any order.
        keep_rounds: newest rounds to keep, counted from the newest in the log; None: all.
        max_bytes: that the log may take on the disk; None: no limit.
    """
    newest = max((file.round_max for file in files), default=0)
    needed_from = standing.safe_round + 1
    if standing.copilot_round is not None:
        needed_from = min(needed_from, standing.copilot_round - standing.buffer_rounds + 1)
    unwanted_to = newest - keep_rounds if keep_rounds is not None else 0
    live = sum(file.bytes for file in files)
    allowed = live
    if max_bytes is not None:
        allowed = max(max_bytes - standing.recent_bytes - standing.headroom_bytes, max_bytes // 2)
    chosen: list[StoredFile] = []
    blocked: StoredFile | None = None
    for file in sorted(files, key=lambda file: (file.round_max, file.name)):
        if file.round_max > unwanted_to and live <= allowed:
            break
        if file.round_max >= needed_from:
            blocked = file
            break
        chosen.append(file)
        live -= file.bytes
    return Retirement(chosen, _unmet(standing, live, max_bytes, unwanted_to, blocked))


def _unmet(
    standing: Standing, live: int, max_bytes: int | None, unwanted_to: int, blocked: StoredFile | None
) -> str | None:
    if max_bytes is not None and live > max_bytes and blocked is not None:
        return f"log.max_bytes {max_bytes:,}: the log's files hold {live:,} bytes, and {_reason(standing, blocked)}"
    if max_bytes is not None and standing.disk_bytes > max_bytes:
        return (
            f"log.max_bytes {max_bytes:,}: {standing.disk_bytes:,} bytes are on the disk, of which {live:,} in the log; the "
            "others have left it and wait for log.vacuum_grace_seconds or for readers of older versions"
        )
    if blocked is not None and blocked.round_max <= unwanted_to:
        return f"log.keep_rounds: rounds up to {unwanted_to} should go, but {_reason(standing, blocked)}"
    return None


def _reason(standing: Standing, blocked: StoredFile) -> str:
    rounds = f"rounds {blocked.round_min} to {blocked.round_max}"
    copilot = standing.copilot_round
    if copilot is not None and blocked.round_max > copilot:
        return f"the Copilot, at round {copilot}, has still to read {rounds}"
    if copilot is not None and blocked.round_max > copilot - standing.buffer_rounds:
        return f"{rounds} are in the Copilot's buffer (copilot.buffer_rounds {standing.buffer_rounds})"
    return f"{rounds} may still be written again (the last checkpoint is at round {standing.safe_round})"
