"""The rows of a log in an object store as a Ray dataset, which other processes read."""

from __future__ import annotations

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.local_ray import local_ray
from tests.support.mistakelog_samples import metadata, random_records
from tests.support.object_store import new_log_uri, store_options

ROWS = 4
options, cluster = store_options(), local_ray(cpus=1)


def test_the_dataset_reads_a_pinned_version_in_other_processes(options: dict[str, str]) -> None:
    place = LogStore.create(Location(new_log_uri(options), options), metadata()).location
    ledger = Ledger(place, writers=1, run="test")
    settings = LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=4)
    writer = RecordWriter(place, ledger.commit, settings, run="test", rank=0, attempt=ledger.begin_attempt(0, 1))

    def put(number: int) -> None:
        writer.put(random_records(ROWS, round=number, first_sample=10 * number), number)
        writer.end_round(number)

    for number in range(1, 5):
        put(number)
    writer.flush(4)
    with MistakeLog(place) as log:
        put(5)
        writer.close()
        assert MistakeLog(place).version > log.version
        rows = log.dataset(rounds=(2, 9), columns=["round", "sample_id"]).take_all()
    assert sorted((row["round"], row["sample_id"]) for row in rows) == [
        (number, 10 * number + i) for number in range(2, 5) for i in range(ROWS)
    ]
