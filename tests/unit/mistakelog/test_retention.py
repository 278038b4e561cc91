"""What leaves a log: the policy alone, on invented files."""

from __future__ import annotations

import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.maintain.maintenance import Position, retire
from tc_ray.mistakelog.table.store import StoredFile


def file(first: int, last: int, size: int = 100, rank: int = 0) -> StoredFile:
    return StoredFile(f"f{first}-{last}-{rank}", 10, size, "test", first, last, rank, 1, 0)


FILES = [file(first, first + 9) for first in range(1, 101, 10)]
"""Rounds 1 to 100, ten rounds and 100 bytes a file."""


def retired(
    files: list[StoredFile] = FILES,
    *,
    safe_round: int = 100,
    copilot_round: int | None = None,
    buffer_rounds: int = 20,
    keep_rounds: int | None = None,
    max_bytes: int | None = None,
    reserved_bytes: int = 0,
) -> list[StoredFile]:
    position = Position({}, safe_round, copilot_round, attempt=1)
    limits = LogSection(keep_rounds=keep_rounds, max_bytes=max_bytes)
    return retire(files, position, limits, buffer_rounds, reserved_bytes)


def rounds(files: list[StoredFile]) -> list[int]:
    return [file.round_max for file in files]


def test_no_limits_no_work() -> None:
    assert retired() == []
    assert retired([], keep_rounds=5, max_bytes=5) == []


def test_old_rounds_go_in_whole_files() -> None:
    assert rounds(retired(keep_rounds=35)) == [10, 20, 30, 40, 50, 60]
    # round 65 is the oldest to keep: the file that ends with 70 stays
    assert rounds(retired(keep_rounds=30))[-1] == 70


def test_bytes_above_the_limit_go_oldest_first() -> None:
    assert rounds(retired(max_bytes=750)) == [10, 20, 30]
    assert retired(max_bytes=1000) == []


def test_files_of_all_ranks_go_together() -> None:
    files = [file(first, first + 9, rank=rank) for rank in (1, 0) for first in (1, 11)]
    gone = retired(files, safe_round=20, keep_rounds=10)
    assert sorted(f.name for f in gone) == ["f1-10-0", "f1-10-1"]


@pytest.mark.parametrize("limits", [{"keep_rounds": 1}, {"max_bytes": 1}])
def test_what_the_copilot_has_to_read_stays(limits: dict[str, int]) -> None:
    # its buffer holds rounds 41 to 60
    assert rounds(retired(copilot_round=60, **limits)) == [10, 20, 30, 40]
    assert retired(copilot_round=0, **limits) == []


def test_rounds_that_may_be_written_again_stay() -> None:
    assert rounds(retired(safe_round=25, keep_rounds=10)) == [10, 20]


def test_room_is_kept_for_what_waits_for_removal() -> None:
    """300 bytes were written in the grace time: as many leave the table in the next, and stay on the disk that long."""
    assert rounds(retired(max_bytes=1000, reserved_bytes=300)) == [10, 20, 30]
    # never more than half of the limit, however fast the Pilot writes
    assert len(retired(max_bytes=1000, reserved_bytes=5000)) == 5


def test_a_steady_run_stays_under_its_limit() -> None:
    """A run of 400 commits of 100 bytes; files are deleted 5 commits after they were retired."""
    limit, grace = 2000, 5
    live: list[StoredFile] = []
    waiting: list[tuple[int, int]] = []
    highest = 0
    for at in range(1, 401):
        live.append(file(at, at))
        waiting = [(since, size) for since, size in waiting if at - since <= grace]
        highest = max(highest, sum(f.bytes for f in live) + sum(size for _, size in waiting))
        gone = retired(
            live,
            safe_round=at,
            copilot_round=at,
            buffer_rounds=3,
            max_bytes=limit,
            reserved_bytes=100 * min(at, grace + 2),
        )
        waiting += [(at, f.bytes) for f in gone]
        live = [f for f in live if f not in gone]
    assert highest <= limit
    assert sum(f.bytes for f in live) >= limit - 100 * (grace + 3), "more was retired than needed"
