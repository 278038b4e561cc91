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

from tc_ray.mistakelog.table.store import StoredFile


def retire(
    files: Sequence[StoredFile],
    *,
    safe_round: int,
    copilot_round: int | None,
    buffer_rounds: int,
    keep_rounds: int | None,
    max_bytes: int | None,
    reserved_bytes: int = 0,
) -> list[StoredFile]:
    """The files to remove from the table, oldest first.

    Args:
        files: of the table, in any order.
        safe_round: last round that no restart of the Pilot takes back.
        copilot_round: last round consumed by the Copilot; None: there is no Copilot.
        buffer_rounds: that the Copilot draws from.
        keep_rounds: newest rounds to keep, counted from the newest in the log; None: all.
        max_bytes: that the log may take on the disk; None: no limit.
        reserved_bytes: for files that wait for their removal, and for what is written before the next call.
    """
    needed_from = safe_round + 1
    if copilot_round is not None:
        needed_from = min(needed_from, copilot_round - buffer_rounds + 1)
    newest = max((file.round_max for file in files), default=0)
    unwanted_to = newest - keep_rounds if keep_rounds is not None else 0
    live = allowed = sum(file.bytes for file in files)
    if max_bytes is not None:
        allowed = max(max_bytes - reserved_bytes, max_bytes // 2)
    chosen = []
    for file in sorted(files, key=lambda file: (file.round_max, file.name)):
        if file.round_max >= needed_from or (file.round_max > unwanted_to and live <= allowed):
            break
        chosen.append(file)
        live -= file.bytes
    return chosen
