"""Merging small files: the plan on invented files, the rewrite on real ones."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.compaction import merge, merge_plan
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.data_file import BadFileError, Compression
from tc_ray.mistakelog.table.errors import CommitConflictError
from tc_ray.mistakelog.table.store import LogStore, StoredFile
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, in_order, merge_all, metadata, random_records

ROWS = 3


def file(round: int, size: int, rank: int = 0) -> StoredFile:
    return StoredFile(f"f{round:03d}-{rank}", 10, size, "test", round, round, rank, 1, 0)


def plan(sizes: list[int], target: int = 1000, safe: int = 1000, most_rounds: int | None = None) -> list[list[int]]:
    files = [file(round, size) for round, size in enumerate(sizes, 1)]
    groups = merge_plan(list(reversed(files)), target, safe, most_rounds=most_rounds)
    return [[member.round_min for member in group] for group in groups]


def test_neighbours_are_merged_up_to_the_target() -> None:
    assert plan([300, 300, 300, 200, 200]) == [[1, 2, 3]]
    assert plan([400, 400, 400, 400]) == [[1, 2], [3, 4]]
    assert plan([]) == plan([10]) == []


def test_large_files_divide_the_rest() -> None:
    assert plan([300, 300, 600, 300, 300]) == [[1, 2], [4, 5]]
    assert plan([600, 500, 300, 900]) == []


def test_a_merged_file_spans_no_more_rounds_than_told() -> None:
    assert plan([1] * 7, most_rounds=3) == [[1, 2, 3], [4, 5, 6]], "complete, so it pays however small"
    assert plan([1] * 7, most_rounds=1) == []
    files = [StoredFile("m", 10, 3, "test", 1, 3, 0, 1, 0), file(4, 1), file(5, 1)]
    assert merge_plan(files, 1000, 5, most_rounds=3) == [], "a merged file is not merged again"


def test_rounds_that_may_be_fenced_are_left() -> None:
    assert plan([300, 300, 300], safe=2) == [[1, 2]]
    assert plan([300, 300, 300], safe=1) == []


def test_merging_waits_until_it_pays() -> None:
    """Otherwise every commit would copy the file that the last one made."""
    assert plan([10] * 7) == []
    assert plan([10] * 8) == [list(range(1, 9))]
    assert plan([200] + [10] * 10) == [], "a large file would be copied for little"
    sizes: list[int] = []
    copied = 0
    for _ in range(1000):
        sizes.append(1)
        for group in plan(sizes):
            total = sum(sizes[at - 1] for at in group)
            copied += total
            sizes[group[0] - 1 : group[-1]] = [total]
    assert copied < 10 * 1000, "a byte is copied log2(target) times at most"
    assert len(sizes) < 40


def test_files_of_several_ranks_are_neighbours() -> None:
    files = [file(round, 100, rank) for rank in (0, 1) for round in (1, 2, 3)]
    (group,) = merge_plan(files, 1000, 3)
    assert [(member.round_min, member.rank) for member in group] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)]


def written(
    folder: Path, rounds: int = 8, ranks: int = 1, compression: Compression = "none"
) -> tuple[Ledger, list[Records]]:
    """A log with one file a round and rank."""
    LogStore.create(folder, metadata())
    ledger = Ledger(folder, writers=ranks, run="test")
    attempt = ledger.begin_attempt(0, ranks)
    put = []
    for rank in range(ranks):
        writer = RecordWriter(
            folder,
            ledger.commit,
            LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=8, compression=compression),
            run="test",
            rank=rank,
            attempt=attempt,
        )
        for number in range(1, rounds + 1):
            put.append(random_records(ROWS, round=number, rank=rank, first_sample=100 * number + 10 * rank))
            writer.put(put[-1], number)
            writer.end_round(number)
        writer.close()
    return ledger, put


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_rows_stay_what_they_were(tmp_path: Path, ranks: int) -> None:
    _, put = written(tmp_path, ranks=ranks)
    before = MistakeLog(tmp_path)
    merge_all(tmp_path)
    after = MistakeLog(tmp_path)
    assert len(after.files) == 1
    assert_same(in_order(after.records()), in_order(Records.concat(put)))
    assert_same(before.records(), Records.concat([before.records((n, n)) for n in range(1, 9)]))
    merged = after.files[0]
    assert (merged.round_min, merged.round_max, merged.rows) == (1, 8, 8 * ranks * ROWS)
    assert merged.crc32
    assert verify_log(tmp_path).good


def test_the_run_goes_on_after_a_merge(tmp_path: Path) -> None:
    """Positions and fencing do not change by it, and a fence may cut the merged file."""
    written(tmp_path)
    tail = LogTail(tmp_path)
    first = tail.poll()
    merge_all(tmp_path)
    second = tail.poll()
    assert sorted(second.removed) == sorted(name for name, _ in first.new)
    assert [len(records) for _, records in second.new] == [8 * ROWS]
    ledger = Ledger(tmp_path, writers=1, run="test")
    assert (ledger.state().round, ledger.state().rows) == (8, 8 * ROWS)
    ledger.begin_attempt(5, 1)
    assert MistakeLog(tmp_path).records().round.tolist() == [n for n in range(1, 6) for _ in range(ROWS)]


def test_a_damaged_file_is_not_laundered(tmp_path: Path) -> None:
    written(tmp_path)
    victim = LogStore(tmp_path).files()[3]
    content = bytearray((tmp_path / victim.name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / victim.name).write_bytes(content)
    with pytest.raises(BadFileError, match="CRC-32"):
        merge(LogStore(tmp_path), LogStore(tmp_path).files(), lambda: nullcontext({"x": 1}))
    assert len(LogStore(tmp_path).files()) == 8
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
    assert [error.name for error in verify_log(tmp_path).bad] == [victim.name]


def test_pages_stay_compressed_as_they_were(tmp_path: Path) -> None:
    written(tmp_path, compression="zstd")
    merge_all(tmp_path)
    Ledger(tmp_path, writers=1, run="test").begin_attempt(5, 1)
    files = {path.name: pq.ParquetFile(path).metadata.row_group(0).column(0) for path in tmp_path.glob("*.parquet")}
    assert any("merged" in name and "cut5" not in name for name in files) and any("cut5" in name for name in files)
    assert {column.compression for column in files.values()} == {"ZSTD"}


def test_a_merged_file_stays_while_its_commit_may_still_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that did not answer in time may get the commit later. Vacuum takes the file if it never does."""
    written(tmp_path)
    store = LogStore(tmp_path)

    def lost(**_: object) -> int:
        raise TimeoutError("no answer")

    for remote in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(store, "commit", lost)
            patch.setattr(
                "tc_ray.mistakelog.maintain.compaction._may_arrive_late", lambda location, remote=remote: remote
            )
            with pytest.raises(TimeoutError):
                merge(store, store.files(), lambda: nullcontext({"x": 1}))
        assert any("merged" in path.name for path in tmp_path.iterdir()) == remote


def test_a_second_committer_wins_and_the_merged_file_goes(tmp_path: Path) -> None:
    written(tmp_path)
    store, other = LogStore(tmp_path), LogStore(tmp_path)
    other.commit(numbers={"x": 1})
    with pytest.raises(CommitConflictError):
        merge(store, store.files(), lambda: nullcontext({"x": 2}))
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]
    assert len(LogStore(tmp_path).files()) == 8
