"""Verification names every kind of damage and nothing else; quarantine takes it out of the log."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.quarantine import quarantined, set_aside
from tc_ray.mistakelog.maintain.vacuum import vacuum_log
from tc_ray.mistakelog.maintain.verify import check_file, verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.read.reader_lease import held_versions
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import ROW_SCHEMA
from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.lease import LeaseHeldError, RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore, StoredFile
from tests.support.mistakelog_samples import merge_all
from tests.unit.mistakelog.test_compaction import ROWS, written

ROUNDS = 6


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def same_size_foreign(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "missing"),
    "empty": (lambda path: path.write_bytes(b""), "0 bytes, committed with"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "bytes, committed with"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, committed with"),
    "flipped": (flip, "CRC-32"),
    "zeros": (same_size_foreign, "CRC-32"),
}


def test_a_good_log_is_good(tmp_path: Path) -> None:
    written(tmp_path, rounds=ROUNDS)
    result = verify_log(tmp_path)
    assert result.good and (result.files, result.rows) == (ROUNDS, ROUNDS * ROWS)
    assert result.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    assert result.lines()[-1] == "every file is what was committed"


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_damage_is_named(tmp_path: Path, kind: str) -> None:
    written(tmp_path, rounds=ROUNDS)
    damage, reason = DAMAGE[kind]
    victim = LogStore(tmp_path).files()[2]
    damage(tmp_path / victim.name)
    result = verify_log(tmp_path)
    assert [error.name for error in result.bad] == [victim.name]
    assert reason in result.bad[0].reason
    assert (result.good, result.rows) == (False, (ROUNDS - 1) * ROWS)
    assert f"BAD {victim.name}" in result.lines()[1]


def test_swapped_files_are_both_named(tmp_path: Path) -> None:
    written(tmp_path, rounds=ROUNDS)
    one, other = (tmp_path / file.name for file in LogStore(tmp_path).files()[:2])
    shutil.move(one, tmp_path / "x")
    shutil.move(other, one)
    shutil.move(tmp_path / "x", other)
    assert {error.name for error in verify_log(tmp_path).bad} == {one.name, other.name}


def rewritten(folder: Path, change: Callable[[pa.Table], pa.Table]) -> tuple[LogStore, StoredFile]:
    """A store and a file whose rows were changed by something that also knew to put the checksums right."""
    written(folder, rounds=ROUNDS)
    store = LogStore(folder)
    file = store.files()[0]
    path = folder / file.name
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    shape = {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    return store, StoredFile(**{**file.__dict__, **shape})


def replaced(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), ROW_SCHEMA.field(name), values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: replaced(table, "run", pa.array(["other"] * ROWS)), "rows of run"),
        (lambda table: replaced(table, "round", pa.array([9] * ROWS)), "rounds 9 to 9, committed as 1 to 1"),
        (lambda table: replaced(table, "target_start", pa.array([0] * ROWS, pa.int32())), "target_start"),
        (lambda table: table.slice(1), "2 rows, committed with 3"),
        (lambda table: table.drop_columns(["error_ids"]), "columns error_ids are missing"),
        (lambda table: replaced(table, "rationale", pa.array([b"abc"] * ROWS)), "rationale"),
    ],
)
def test_rows_are_checked_too(tmp_path: Path, change: Callable[[pa.Table], pa.Table], reason: str) -> None:
    store, file = rewritten(tmp_path, change)
    with pytest.raises(BadFileError, match=reason):
        check_file(store, file)


def test_a_file_of_an_unknown_schema_version_is_named_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As committed, and readable as Parquet, but a later tc-ray may mean something else by these columns."""
    usual = Records.arrow_metadata

    def later(records: Records) -> dict[str, str]:
        return usual(records) | ({"tc_ray.schema_version": "9"} if records.round[0] == 3 else {})

    monkeypatch.setattr(Records, "arrow_metadata", later)
    written(tmp_path, rounds=ROUNDS)
    victim = LogStore(tmp_path).files()[2].name
    reason = "Mistake Log schema version 9, but this tc-ray reads version 3"
    result = verify_log(tmp_path)
    assert [(bad.name, bad.reason) for bad in result.bad] == [(victim, reason)]
    log = MistakeLog(tmp_path)
    assert sum(len(records) for _, records in log.pieces(batch=1)) == (ROUNDS - 1) * ROWS
    assert [(bad.name, bad.reason) for bad in log.bad_files] == [(victim, reason)]


def test_a_row_that_is_there_twice_is_counted(tmp_path: Path) -> None:
    written(tmp_path, rounds=ROUNDS)
    store = LogStore(tmp_path)
    file = store.files()[0]
    copy = "rounds-00000001-00000001-merged-copy.parquet"
    shutil.copy(tmp_path / file.name, tmp_path / copy)
    from tc_ray.mistakelog.table.data_file import DataFile

    again = DataFile(copy, file.rows, file.bytes, 1, 1, 0, 1, -1, int(file.crc32 or 0))
    store.commit(add=[again], numbers={"x": 1})
    result = verify_log(tmp_path)
    assert (result.twice, result.good, result.bad) == (ROWS, False, [])


def test_the_version_is_held_while_it_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking a large log takes longer than removed files stay."""
    written(tmp_path)
    removed = []

    def meanwhile(store: LogStore, file: StoredFile) -> tuple[pa.Table, int]:
        monkeypatch.undo()
        merge_all(tmp_path)
        removed.extend(vacuum_log(tmp_path, orphan_seconds=0, grace_seconds=0).removed)
        return check_file(store, file)

    monkeypatch.setattr("tc_ray.mistakelog.maintain.verify.check_file", meanwhile)
    result = verify_log(tmp_path)
    assert len(LogStore(tmp_path).files()) == 1
    assert result.good and result.files == 8 and not removed
    assert held_versions(Location(tmp_path), Location(tmp_path).now()) == []


def test_short_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No healthy file may leave the log for it."""
    ledger, _ = written(tmp_path)

    def no_memory(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 512 failed")

    monkeypatch.setattr(pq.ParquetFile, "read", no_memory)
    for act in (
        lambda: verify_log(tmp_path),
        lambda: MistakeLog(tmp_path).records(),
        lambda: ledger.quarantine(LogStore(tmp_path).files()[0].name, "a reader's opinion"),
        lambda: verify_log(tmp_path, quarantine=True),
    ):
        with pytest.raises(MemoryError):
            act()
    assert len(LogStore(tmp_path).files()) == 8 and quarantined(Location(tmp_path)) == []


def test_quarantine_takes_damage_out_and_keeps_the_rest(tmp_path: Path) -> None:
    written(tmp_path, rounds=ROUNDS)
    files = LogStore(tmp_path).files()
    flip(tmp_path / files[1].name)
    (tmp_path / files[3].name).unlink()
    before = MistakeLog(tmp_path, version=LogStore(tmp_path).version)
    result = verify_log(tmp_path, quarantine=True)
    assert [line.name for line in result.quarantined] == [files[1].name, files[3].name]
    assert {line.rows for line in result.quarantined} == {ROWS}
    reports = f"quarantined {files[1].name}: {ROWS} rows of rounds 2 to 2 are lost ({result.bad[0].reason})"
    assert reports in result.lines()
    assert {path.name for path in (tmp_path / "_tc_ray/quarantine").iterdir()} == {"quarantine.jsonl", files[1].name}
    after = verify_log(tmp_path)
    assert after.good and (after.files, after.quarantined_before) == (ROUNDS - 2, result.quarantined)
    assert reports.replace("quarantined", "quarantined earlier") in after.lines()
    assert sorted(set(MistakeLog(tmp_path).records().round.tolist())) == [1, 3, 5, 6]
    assert [line.reason for line in quarantined(Location(tmp_path))][1] == "missing"
    ledger = Ledger(tmp_path, writers=1, run="test")
    assert (ledger.state().round, ledger.state().rows) == (ROUNDS, (ROUNDS - 2) * ROWS)
    # a reader of the version before passes over them and says so
    assert sorted(set(before.records().round.tolist())) == [1, 3, 5, 6]
    assert {error.name for error in before.bad_files} == {files[1].name, files[3].name}
    assert set_aside(LogStore(tmp_path), result.bad, numbers={"x": 1}) == [], "a repetition changes nothing"


def test_quarantine_needs_the_log_for_itself(tmp_path: Path) -> None:
    written(tmp_path, rounds=ROUNDS)
    with RunLease.take(Location(tmp_path), "run 'test'"):
        assert verify_log(tmp_path).good
        with pytest.raises(LeaseHeldError):
            verify_log(tmp_path, quarantine=True)
