"""Merging, leases, vacuum, verification and quarantine of a log in an object store."""

from __future__ import annotations

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.maintain.quarantine import quarantined
from tc_ray.mistakelog.maintain.vacuum import vacuum_log
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import assert_same, in_order, merge_all, metadata, random_records
from tests.support.object_store import new_log_uri, store_options

ROUNDS, ROWS = 8, 3


options = store_options()


def batch(round: int) -> Records:
    return random_records(ROWS, round=round, first_sample=100 * round)


def written(place: Location, limits: LogSection | None = None, rounds: int = ROUNDS) -> Ledger:
    LogStore.create(place, metadata())
    ledger = LedgerActor(place, writers=1, run="test", settings=limits)
    writer = RecordWriter(
        place,
        ledger.commit,
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=8),
        run="test",
        rank=0,
        attempt=ledger.begin_attempt(0, 1),
    )
    for number in range(1, rounds + 1):
        writer.put(batch(number), number)
        writer.end_round(number)
        assert writer.flush(number)
        ledger.report_checkpoint(number)
        ledger.report_copilot(number, number)
    writer.close()
    return ledger


def assert_whole(log: MistakeLog, first: int = 1, last: int = ROUNDS) -> None:
    records = log.records()
    assert not log.bad_files
    assert_same(in_order(records), Records.concat([batch(n) for n in range(first, last + 1)]))


def data_files(place: Location) -> set[str]:
    return {entry.name for entry in place.list(recursive=False)}


def test_merge_hold_and_vacuum(options: dict[str, str]) -> None:
    place = Location(new_log_uri(options), options)
    written(place)
    before = data_files(place)
    reader = MistakeLog(place)
    merge_all(place)
    assert len(LogStore(place).files()) == 1
    kept = vacuum_log(place, orphan_seconds=3600, grace_seconds=0)
    assert kept.held == [reader.version] and not kept.removed
    assert_whole(reader)
    reader.close()
    done = vacuum_log(place, orphan_seconds=3600, grace_seconds=0)
    assert {entry.name for entry in done.removed} == before
    assert data_files(place) == {file.name for file in LogStore(place).files()}
    assert_whole(MistakeLog(place))
    assert verify_log(place).good


def test_maintenance_of_a_run(options: dict[str, str]) -> None:
    place = Location(new_log_uri(options), options)
    limits = LogSection(
        file_bytes=1 << 20,
        keep_rounds=16,
        vacuum_grace_seconds=1e-6,
        orphan_seconds=3600,
    )
    ledger = written(place, limits, rounds=20)
    ledger.maintain()  # waits for the thread
    state = ledger.state()
    assert state.files < 13 and state.rows == 16 * ROWS
    assert_whole(MistakeLog(place), first=5, last=20)


def test_a_damaged_object_is_set_aside(options: dict[str, str]) -> None:
    place = Location(new_log_uri(options), options)
    written(place)
    victim = LogStore(place).files()[4]
    content = bytearray(place.read(victim.name))
    content[len(content) // 2] ^= 4
    place.write(victim.name, bytes(content))
    result = verify_log(place, quarantine=True)
    assert [line.name for line in result.quarantined] == [victim.name]
    assert [line.name for line in quarantined(place)] == [victim.name]
    assert place.read(f"_tc_ray/quarantine/{victim.name}") == bytes(content)
    assert place.size(victim.name) is None
    assert verify_log(place).good
    assert sorted(set(MistakeLog(place).records().round.tolist())) == [n for n in range(1, ROUNDS + 1) if n != 5]
