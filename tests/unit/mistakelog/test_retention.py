"""What leaves a log: the policy alone, on invented files."""

from __future__ import annotations

import pytest

from tc_ray.mistakelog.maintain.retention import Standing, retire
from tc_ray.mistakelog.table.store import StoredFile


def file(first: int, last: int, size: int = 100, rank: int = 0) -> StoredFile:
    return StoredFile(f"f{first}-{last}-{rank}", 10, size, "test", first, last, rank, 1)


FILES = [file(first, first + 9) for first in range(1, 101, 10)]
"""Rounds 1 to 100, ten rounds and 100 bytes a file."""
NO_COPILOT = Standing(safe_round=100, copilot_round=None, buffer_rounds=20)


def rounds(files: list[StoredFile]) -> list[int]:
    return [file.round_max for file in files]


def test_no_limits_no_work() -> None:
    answer = retire(FILES, NO_COPILOT, keep_rounds=None, max_bytes=None)
    assert (answer.files, answer.unmet) == ([], None)
    assert retire([], NO_COPILOT, keep_rounds=5, max_bytes=5).files == []


def test_old_rounds_go_in_whole_files() -> None:
    answer = retire(FILES, NO_COPILOT, keep_rounds=35, max_bytes=None)
    assert rounds(answer.files) == [10, 20, 30, 40, 50, 60]
    assert answer.unmet is None
    # round 65 is the oldest to keep: the file that ends with 70 stays
    assert rounds(retire(FILES, NO_COPILOT, keep_rounds=30, max_bytes=None).files)[-1] == 70


def test_bytes_above_the_limit_go_oldest_first() -> None:
    assert rounds(retire(FILES, NO_COPILOT, keep_rounds=None, max_bytes=750).files) == [10, 20, 30]
    assert retire(FILES, NO_COPILOT, keep_rounds=None, max_bytes=1000).files == []


def test_files_of_all_ranks_go_together() -> None:
    files = [file(first, first + 9, rank=rank) for rank in (1, 0) for first in (1, 11)]
    answer = retire(files, Standing(20, None, 1), keep_rounds=10, max_bytes=None)
    assert sorted(f.name for f in answer.files) == ["f1-10-0", "f1-10-1"]


@pytest.mark.parametrize("limits", [{"keep_rounds": 1, "max_bytes": None}, {"keep_rounds": None, "max_bytes": 1}])
def test_what_the_copilot_has_to_read_stays(limits: dict[str, int | None]) -> None:
    standing = Standing(safe_round=100, copilot_round=60, buffer_rounds=20)
    answer = retire(FILES, standing, **limits)
    # its buffer holds rounds 41 to 60
    assert rounds(answer.files) == [10, 20, 30, 40]
    assert answer.unmet is not None and "rounds 41 to 50 are in the Copilot's buffer" in answer.unmet
    nothing_read = Standing(safe_round=100, copilot_round=0, buffer_rounds=20)
    answer = retire(FILES, nothing_read, **limits)
    assert answer.files == []
    assert answer.unmet is not None and "the Copilot, at round 0, has still to read rounds 1 to 10" in answer.unmet


def test_rounds_that_may_be_written_again_stay() -> None:
    standing = Standing(safe_round=25, copilot_round=None, buffer_rounds=1)
    answer = retire(FILES, standing, keep_rounds=10, max_bytes=None)
    assert rounds(answer.files) == [10, 20]
    assert answer.unmet is not None and "the last checkpoint is at round 25" in answer.unmet


def test_room_is_kept_for_what_waits_for_removal() -> None:
    """300 bytes were written in the grace time: as many leave the table in the next, and stay on the disk that long."""
    standing = Standing(100, None, 1, recent_bytes=300, disk_bytes=900)
    assert rounds(retire(FILES, standing, keep_rounds=None, max_bytes=1000).files) == [10, 20, 30]
    # never more than half of the limit, however fast the Pilot writes
    standing = Standing(100, None, 1, recent_bytes=5000, disk_bytes=900)
    assert len(retire(FILES, standing, keep_rounds=None, max_bytes=1000).files) == 5


def test_a_disk_above_the_limit_for_files_that_wait_is_told() -> None:
    standing = Standing(100, None, 1, disk_bytes=2500)
    answer = retire(FILES, standing, keep_rounds=None, max_bytes=1000)
    assert answer.files == [], "the table itself is within its limit"
    assert answer.unmet is not None and "2,500 bytes are on the disk, of which 1,000 in the log" in answer.unmet


def test_a_steady_run_stays_under_its_limit() -> None:
    """A run of 400 commits of 100 bytes; files are deleted 5 commits after they were retired."""
    limit, grace = 2000, 5
    live: list[StoredFile] = []
    waiting: list[tuple[int, int]] = []
    highest = 0
    for at in range(1, 401):
        live.append(file(at, at))
        waiting = [(since, size) for since, size in waiting if at - since <= grace]
        disk = sum(f.bytes for f in live) + sum(size for _, size in waiting)
        highest = max(highest, disk)
        standing = Standing(at, at, 3, recent_bytes=100 * min(at, grace + 2), disk_bytes=disk)
        answer = retire(live, standing, keep_rounds=None, max_bytes=limit)
        waiting += [(at, f.bytes) for f in answer.files]
        live = [f for f in live if f not in answer.files]
        assert answer.unmet is None
    assert highest <= limit
    assert sum(f.bytes for f in live) >= limit - 100 * (grace + 3), "more was retired than needed"
