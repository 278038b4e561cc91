"""A holder that lost its lease: nothing that it calls changes the log, and everything says why, for good."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.commit.ledger_actor import LedgerActor
from tc_ray.mistakelog.maintain.compaction import merge
from tc_ray.mistakelog.maintain.maintenance import Maintenance, Position
from tc_ray.mistakelog.maintain.quarantine import quarantined, set_aside
from tc_ray.mistakelog.maintain.vacuum import look, vacuum_log
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table import lease as lease_module
from tc_ray.mistakelog.table.commits import commit_name
from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.errors import CommitConflictError, LeaseLostError
from tc_ray.mistakelog.table.lease import RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import metadata, random_records
from tests.unit.mistakelog.test_ledger import rounds_in, written

HOUR = 3600.0
SETTINGS = LogSection(
    file_bytes=1 << 20,
    keep_rounds=1,
    vacuum_grace_seconds=1e-6,
    orphan_seconds=HOUR,
)


def taken_for_dead(place: Location) -> None:
    """Make the present holder one of another machine that has been silent for long."""
    assert place.local is not None
    (name,) = [entry.name for entry in place.list("_tc_ray", recursive=False) if "lease-" in entry.name]
    holder = json.loads(place.read(name))
    holder["process"] |= {"host": "other", "boot": "elsewhere"}
    place.write(name, json.dumps(holder).encode())
    then = time.time() - 2 * lease_module.STALE_SECONDS
    os.utime(place.local / name, (then, then))


class Fenced:
    """A has committed rounds 1 to 3 and was taken for dead; B has taken over and committed 4 and 5."""

    def __init__(self, folder: Path) -> None:
        self.place = LogStore.create(folder, metadata()).location
        self.lease = RunLease.take(self.place, "run A")
        self.ledger = Ledger(self.place, writers=1, run="test", lease=self.lease.number)
        self.attempt = self.ledger.begin_attempt(0, 1)
        for sequence in range(3):
            self.ledger.commit(written(folder, 1 + sequence, 1 + sequence, sequence=sequence))
        # opened while the lease was held, as a command or the Ledger has it when it is stopped
        self.store = LogStore(self.place, lease=self.lease.number)
        taken_for_dead(self.place)
        self.other_lease = RunLease.take(self.place, "run B")
        self.other = Ledger(self.place, writers=1, run="test", lease=self.other_lease.number)
        attempt = self.other.begin_attempt(3, 1)
        for sequence in range(2):
            self.other.commit(written(folder, 4 + sequence, 4 + sequence, attempt=attempt, sequence=sequence))

    def check_untouched(self) -> None:
        """The table holds B's rounds, and B goes on."""
        assert rounds_in(Path(self.place.uri)) == sorted([1, 2, 3, 4, 5] * 2)
        assert verify_log(self.place).good
        assert self.other.state().round == 5
        file = written(Path(self.place.uri), 6, 6, attempt=self.other.state().attempt, sequence=2)
        self.other.commit(file)
        assert rounds_in(Path(self.place.uri)) == sorted([1, 2, 3, 4, 5, 6] * 2)


@pytest.fixture
def fenced(tmp_path: Path) -> Fenced:
    return Fenced(tmp_path / "log")


CALLS: dict[str, Callable[[Fenced], object]] = {
    "commit": lambda a: a.ledger.commit(written(Path(a.place.uri), 4, 4, attempt=a.attempt, sequence=3)),
    "commit repeated": lambda a: a.ledger.commit(written(Path(a.place.uri), 3, 3, attempt=a.attempt, sequence=2)),
    "begin_attempt": lambda a: a.ledger.begin_attempt(3, 1),
    "begin_attempt ahead": lambda a: a.ledger.begin_attempt(9, 1),
    "finish_pilot": lambda a: a.ledger.finish_pilot(3),
    "maintain": lambda a: a.ledger.maintain(),
    "quarantine": lambda a: a.ledger.quarantine("rounds-00000001-rank0-a1-000000.parquet", "damaged"),
    "quarantine unknown": lambda a: a.ledger.quarantine("x.parquet", "damaged"),
}


@pytest.mark.parametrize("first", CALLS)
def test_a_holder_that_lost_its_lease_never_comes_back(fenced: Fenced, first: str) -> None:
    """Fault 1: the first call that looks at the table finds the lease lost, and every later one raises too."""
    for name in [first, *CALLS, first]:
        with pytest.raises(LeaseLostError, match="another process has taken this log over"):
            CALLS[name](fenced)
            pytest.fail(f"{name} went through")
    for call in (
        fenced.ledger.state,
        fenced.ledger.copilot_round,
        lambda: fenced.ledger.report_copilot(3, 3),
        lambda: fenced.ledger.report_checkpoint(3),
    ):
        with pytest.raises(LeaseLostError):
            call()
    fenced.check_untouched()


def test_the_lease_number_of_another_is_never_written_over(fenced: Fenced) -> None:
    """Fault 1: the store refuses by itself, whatever its caller has refreshed before."""
    for moved in (False, True):
        if moved:
            with pytest.raises(LeaseLostError):
                fenced.store.refresh()
            with pytest.raises(LeaseLostError):  # the issue: the second time it went through
                fenced.store.refresh()
        with pytest.raises(LeaseLostError):
            fenced.store.commit(numbers={"x": 1})
    with pytest.raises(LeaseLostError):
        fenced.store.check_lease()
    fenced.check_untouched()


def test_no_commit_moves_behind_those_of_another(tmp_path: Path) -> None:
    """Fault 1, kind: delta-rs puts a blind append behind what others have committed meanwhile, unasked."""
    LogStore.create(tmp_path, metadata())
    one, other = LogStore(tmp_path), LogStore(tmp_path)
    other.commit(numbers={"another": 1})
    with pytest.raises(CommitConflictError):
        one.commit(numbers={"x": 1})
    one.refresh()
    assert one.commit(numbers={"x": 1}) == 2


def test_a_commit_that_another_follows_at_once_is_no_news_to_build_upon(
    fenced: Fenced, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 1, kind: the look after the own commit moves to the version of another, and what is known belongs to an older one."""
    held = LogStore(fenced.place, lease=fenced.other_lease.number)
    real = LogStore.settle

    def overtaken(store: LogStore) -> None:
        if store is held and store.version > before:
            taken_for_dead(fenced.place)
            RunLease.take(fenced.place, "run C")
            store._table.update_incremental()
        real(store)

    before = held.version
    monkeypatch.setattr(LogStore, "settle", overtaken)
    with pytest.raises(LeaseLostError):
        held.commit(numbers={"x": 1})


@pytest.mark.parametrize("restarted", [False, True])
def test_a_restarted_ledger_actor_does_not_bring_the_lease_back(fenced: Fenced, restarted: bool) -> None:
    """Fault 1: Ray starts the actor again with the old number; it lives, and says to every call why the run must stop."""
    if not restarted:
        with pytest.raises(LeaseLostError):
            Ledger(fenced.place, writers=1, run="test", lease=fenced.lease.number)
    else:
        actor = LedgerActor(fenced.place, writers=1, run="test", lease=fenced.lease.number)
        fenced.ledger = actor
        for call in CALLS.values():
            with pytest.raises(LeaseLostError):
                call(fenced)
        with pytest.raises(LeaseLostError):
            actor.state()
    fenced.check_untouched()


def test_what_the_holder_knows_when_it_was_stopped_removes_no_file(fenced: Fenced) -> None:
    """Fault 1, kind: files that B has committed are unknown to A, and old by the time A wakes up: A took them for orphans."""
    folder = Path(fenced.place.uri)
    for path in folder.glob("*.parquet"):
        os.utime(path, (time.time() - 2 * HOUR,) * 2)
    with pytest.raises(LeaseLostError):
        look(fenced.store, orphan_seconds=HOUR, grace_seconds=1, live_attempt=fenced.attempt)
    bad = [BadFileError(file.name, "test") for file in fenced.store.files()]
    with pytest.raises(LeaseLostError):
        set_aside(fenced.store, bad, numbers={})
    assert quarantined(fenced.place) == [], "the list is B's"
    fenced.check_untouched()


def test_maintenance_and_merging_stop(fenced: Fenced) -> None:
    """Fault 1: compaction, retention and vacuum of a fenced holder."""
    files = fenced.store.files()
    before = {path.name for path in Path(fenced.place.uri).iterdir()}
    for _ in range(2):
        with pytest.raises(LeaseLostError):
            merge(fenced.store, files, lambda: nullcontext({}))
        with pytest.raises(LeaseLostError):
            Maintenance(fenced.store, SETTINGS, 1, lambda: nullcontext(Position({}, 3, 3, 1))).maintain()
    assert {path.name for path in Path(fenced.place.uri).iterdir()} == before
    fenced.check_untouched()


@pytest.mark.parametrize("command", ["quarantine", "vacuum"])
def test_commands_that_lose_the_lease_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Fault 1: `verify --quarantine` and `vacuum`, stopped right after they took the lease."""
    folder = tmp_path / "log"
    LogStore.create(folder, metadata())
    ledger = Ledger(folder, writers=1, run="test")
    ledger.begin_attempt(0, 1)
    for sequence in range(3):
        ledger.commit(written(folder, 1 + sequence, 1 + sequence, sequence=sequence))
    damaged = next(iter(sorted(folder.glob("*.parquet"))))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    real, taken = LogStore.__init__, []

    def overtaken(store: LogStore, *args: object, **options: object) -> None:
        real(store, *args, **options)  # type: ignore[arg-type]
        if options.get("lease") is not None and not taken:
            taken_for_dead(store.location)
            taken.append(RunLease.take(store.location, "run B"))
            LogStore(store.location, lease=taken[0].number).commit(numbers={})

    monkeypatch.setattr(LogStore, "__init__", overtaken)
    commands: dict[str, Callable[[], object]] = {
        "quarantine": lambda: verify_log(folder, quarantine=True),
        "vacuum": lambda: vacuum_log(folder, orphan_seconds=0, grace_seconds=0),
    }
    before = sorted(folder.glob("*.parquet*"))
    with pytest.raises(LeaseLostError):
        commands[command]()
    assert sorted(folder.glob("*.parquet*")) == before
    assert len(LogStore(folder).files()) == 3 and damaged.exists()
    assert LogStore(folder).number("tc_ray/lease") == taken[0].number


def test_the_holder_notices_by_itself(fenced: Fenced, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fault 1: the driver's thread looks at the table, and `check` does at once."""
    assert not fenced.lease.lost
    with pytest.raises(LeaseLostError):
        fenced.lease.check()
    assert fenced.lease.lost
    monkeypatch.setattr(lease_module, "_TOUCH_SECONDS", 0.02)
    place = LogStore.create(tmp_path / "second", metadata()).location
    with RunLease.take(place, "run A") as lease:
        (file,) = [path for path in (tmp_path / "second/_tc_ray").iterdir() if path.name.startswith("lease-")]
        file.unlink()  # by hand, or by one that was taken for dead
        written_again_until = time.monotonic() + 5
        while not file.exists():
            assert time.monotonic() < written_again_until
            time.sleep(0.02)
        lease.check()
        taken_for_dead_until = time.monotonic() + 5
        while not lease.lost:
            LogStore(place).commit(numbers={"tc_ray/lease": 7})
            assert time.monotonic() < taken_for_dead_until
            time.sleep(0.05)
        with pytest.raises(LeaseLostError):
            lease.check()
    assert not [path for path in (tmp_path / "second/_tc_ray").iterdir() if path.name.startswith("lease-")]
    assert not [thread for thread in threading.enumerate() if thread.name == "log-lease" and not thread.daemon]


def test_the_writer_says_that_the_lease_is_lost(fenced: Fenced) -> None:
    """Fault 1: with its own type, which decides that Ray Train does not start the Pilot again; also through pickling."""
    writer = RecordWriter(
        fenced.place,
        fenced.ledger.commit,
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=4),
        run="test",
        rank=0,
        attempt=fenced.attempt,
        start_round=3,
    )
    writer.put(random_records(2, round=4, attempt=fenced.attempt, first_sample=40), 4)
    writer.end_round(4)
    with pytest.raises(LeaseLostError) as lost:
        writer.flush(4, timeout=30)
    assert isinstance(pickle.loads(pickle.dumps(lost.value)), LeaseLostError)
    fenced.check_untouched()


def test_a_ledger_without_a_lease_knows_what_it_commits_upon(tmp_path: Path) -> None:
    """Fault 1, kind: `refresh` before a check. Knowledge of an older version is never committed on a newer one."""
    LogStore.create(tmp_path, metadata())
    one = Ledger(tmp_path, writers=1, run="test")
    one.begin_attempt(0, 1)
    Ledger(tmp_path, writers=1, run="test").begin_attempt(0, 1)
    one._store.refresh()
    assert one.begin_attempt(0, 1) == 3
    assert not (tmp_path / commit_name(4)).exists()
    with MistakeLog(tmp_path) as log:
        assert log.version == 3
