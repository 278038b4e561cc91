"""What is acknowledged is on the disk, also where a sync has failed: the system forgets such pages, and says so once.

`PageCache` stands for the system: of a file whose sync failed nothing is on the disk, whatever a later sync of it says.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from deltalake import DeltaTable

from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table import repair as repair_module
from tc_ray.mistakelog.table import store
from tc_ray.mistakelog.table.commits import commit_name
from tc_ray.mistakelog.table.data_file import TEMPORARY_SUFFIX
from tc_ray.mistakelog.table.errors import LogFullError
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import TORN_FOLDER, repair
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.mistakelog_samples import metadata, random_records
from tests.unit.mistakelog.test_ledger import rounds_in, written


class PageCache:
    """Lets the next syncs of chosen files fail, and cuts the power.

    Args:
        below: folder whose files count.
    """

    def __init__(self, below: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._below, self._real = below, os.fsync
        # held open, or a new file would get the number of a removed one
        self._synced: dict[tuple[int, int], int] = {}
        self._lost: dict[tuple[int, int], int] = {}
        self.fail: dict[str, OSError] = {}
        """Ending of a name -> what its next sync fails with, once."""
        monkeypatch.setattr(os, "fsync", self._sync)
        monkeypatch.setattr(os, "fdatasync", self._sync)

    def _sync(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        found = os.fstat(handle)
        for ending in [ending for ending in self.fail if path.endswith(ending)]:
            self._lost[found.st_dev, found.st_ino] = os.dup(handle)
            raise self.fail.pop(ending)
        self._real(handle)
        if (found.st_dev, found.st_ino) not in self._lost:
            self._synced[found.st_dev, found.st_ino] = os.dup(handle)

    def cut_power(self) -> None:
        """Zeros where nothing was synced."""
        for path in self._below.rglob("*"):
            found = path.stat()
            if path.is_file() and (found.st_dev, found.st_ino) not in self._synced:
                path.write_bytes(bytes(found.st_size))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PageCache:
    return PageCache(tmp_path / "log", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, disk: PageCache) -> Path:
    """A log of two committed files, versions 0 to 3."""
    LogStore.create(tmp_path / "log", metadata())
    ledger = Ledger(tmp_path / "log", writers=1, run="test")
    ledger.begin_attempt(0, 1)
    for sequence in range(2):
        ledger.commit(written(tmp_path / "log", 1 + sequence, 1 + sequence, sequence=sequence))
    return tmp_path / "log"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["broken", "full"])
def test_a_commit_whose_sync_failed_is_written_anew(folder: Path, disk: PageCache, code: int) -> None:
    """Fault 4: the second sync finds clean pages and succeeds; only new bytes can be believed."""
    ledger = Ledger(folder, writers=1, run="test")
    third = written(folder, 3, 3, sequence=2)
    disk.fail[".json" if code == errno.EIO else ".writing"] = OSError(code, os.strerror(code))
    if code == errno.EIO:
        disk.fail[".writing"] = OSError(code, os.strerror(code))
    with pytest.raises(OSError) as failed:
        ledger.commit(third)
    assert isinstance(failed.value, LogFullError) == (code == errno.ENOSPC)
    ledger.commit(third)  # as the writer does: it hands the file over again
    assert ledger.state().round == 3
    disk.cut_power()
    assert Ledger(folder, writers=1, run="test").state().round == 3
    assert rounds_in(folder) == [1, 1, 2, 2, 3, 3]


def test_nothing_is_built_on_a_commit_that_is_not_on_the_disk(folder: Path, disk: PageCache) -> None:
    """Fault 4: else a power cut leaves zeros under later commits, and the table cannot be opened any more."""
    ledger = Ledger(folder, writers=1, run="test")
    third, fourth = written(folder, 3, 3, sequence=2), written(folder, 4, 4, sequence=3)
    disk.fail[".writing"] = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError):
        ledger.commit(third)
    disk.fail[".writing"] = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError):
        ledger.commit(fourth)
    assert not (folder / commit_name(5)).exists()
    disk.cut_power()
    assert repair(Location(folder)) and rounds_in(folder) == [1, 1, 2, 2]


def test_a_commit_that_waits_for_space_does_not_keep_vacuum_from_making_it(
    tmp_path: Path, disk: PageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4, kind: bytes that are written anew need space. What left with that commit stays, for a power cut may take it back."""
    place = LogStore.create(tmp_path / "log", metadata()).location
    limits = LogSection(
        compact=False,
        file_bytes=1 << 20,
        keep_rounds=1,
        vacuum_grace_seconds=1e-6,
        orphan_seconds=3600,
    )
    ledger = Ledger(place, writers=1, run="test")
    ledger.begin_attempt(0, 1)
    for sequence in range(3):
        ledger.commit(written(tmp_path / "log", 1 + sequence, 1 + sequence, sequence=sequence))
    old, left, last = sorted((tmp_path / "log").glob("*.parquet"))
    store = LogStore(place)
    store.commit(remove=[file for file in store.files() if file.name == old.name], numbers={})
    ledger = Ledger(place, writers=1, run="test", settings=limits)
    ledger.report_checkpoint(3)
    ledger.report_copilot(3, 3)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:

        def no_space(path: Path, content: bytes) -> None:
            raise full

        patch.setattr(repair_module, "write_file", no_space)
        files = [file for file in ledger._store.files() if file.name == left.name]
        with pytest.raises(LogFullError):
            ledger._store.commit(remove=files, numbers={})
        ledger.maintain()
        assert not old.exists() and left.exists() and last.exists()
    ledger.maintain()
    assert ledger.state().round == 3 and rounds_in(tmp_path / "log") == [3, 3]


@pytest.mark.parametrize("repeated", [False, True], ids=["next", "repeated"])
def test_what_a_ledger_left_in_the_cache_is_on_the_disk_before_it_is_acknowledged(
    folder: Path, disk: PageCache, monkeypatch: pytest.MonkeyPatch, repeated: bool
) -> None:
    """Fault 4: it was killed between a commit and its sync, or after a sync that failed: the next one finds the commit, and must
    not take it for durable, whatever a sync says."""
    dying = Ledger(folder, writers=1, run="test")
    third = written(folder, 3, 3, sequence=2)

    def killed(location: Location, versions: object) -> None:
        disk.fail[commit_name(4)] = OSError(errno.EIO, "Input/output error")
        with open(folder / commit_name(4), "rb") as file, pytest.raises(OSError):
            os.fsync(file.fileno())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "renew_commits", killed)
        with pytest.raises(KeyboardInterrupt):
            dying.commit(third)
    following = Ledger(folder, writers=1, run="test")
    following.commit(third if repeated else written(folder, 4, 4, sequence=3))
    disk.cut_power()
    last = 3 if repeated else 4
    assert following.state().round == last
    assert Ledger(folder, writers=1, run="test").state().round == last
    assert rounds_in(folder) == sorted([*range(1, last + 1)] * 2)


def test_a_commit_that_cannot_be_read_back_is_not_acknowledged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 4: the cache has let the pages go, and the disk has zeros."""
    ledger = Ledger(folder, writers=1, run="test")
    third, real = written(folder, 3, 3, sequence=2), repair_module.renew_commits

    def lost(location: Location, versions: range) -> None:
        if 4 in versions:
            (folder / commit_name(4)).write_bytes(bytes(500))
        real(location, versions)

    monkeypatch.setattr(store, "renew_commits", lost)
    for _ in range(2):
        with pytest.raises(OSError, match=r"cannot be read back .* the disk has lost it"):
            ledger.commit(third)
    monkeypatch.undo()
    again = Ledger(folder, writers=1, run="test")
    assert (folder / TORN_FOLDER / Path(commit_name(4)).name).exists()
    again.commit(third)
    assert rounds_in(folder) == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_a_data_file_whose_sync_failed_is_written_anew(
    folder: Path, disk: PageCache, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Fault 4, kind: the records are still in memory, so the file is made again, under another name."""
    ledger = Ledger(folder, writers=1, run="test")
    attempt = ledger.begin_attempt(2, 1)
    monkeypatch.setattr("tc_ray.mistakelog.table.data_file.ROW_GROUP_BYTES", 1 if call == "fdatasync" else 16 << 20)
    writer = RecordWriter(
        folder,
        ledger.commit,
        LogSection(flush_rounds=1, file_bytes=2**30, queue_rounds=4),
        run="test",
        rank=0,
        attempt=attempt,
        start_round=2,
    )
    disk.fail[TEMPORARY_SUFFIX] = OSError(errno.ENOSPC, "No space left on device")
    writer.put(random_records(2, round=3, attempt=attempt, first_sample=30), 3)
    writer.end_round(3)
    assert writer.flush(3, timeout=30)
    writer.close()
    disk.cut_power()
    assert rounds_in(folder) == [1, 1, 2, 2, 3, 3]
    with MistakeLog(folder) as log:
        assert not log.bad_files and log.files[-1].name.endswith("-t1.parquet")


TORN = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "half zeros": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
}


@pytest.mark.parametrize("how", TORN)
@pytest.mark.parametrize("which", ["checkpoint", "pointer", "both", "gone"])
def test_a_torn_checkpoint_keeps_nobody_from_reading(folder: Path, which: str, how: str) -> None:
    """Fault 4, kind: as another tool, which does not sync either, leaves one. A reader, too, opens the table."""
    repair_module.write_checkpoint(Location(folder), LogStore(folder)._table)
    (checkpoint,) = folder.glob("_delta_log/*.checkpoint.parquet")
    pointer = folder / "_delta_log" / "_last_checkpoint"
    if which == "gone":
        checkpoint.unlink()
    for path in {"checkpoint": [checkpoint], "pointer": [pointer], "both": [checkpoint, pointer]}.get(which, []):
        path.write_bytes(TORN[how](path.read_bytes()))
    assert rounds_in(folder) == [1, 1, 2, 2]
    assert Ledger(folder, writers=1, run="test").state().round == 2


def test_a_reader_that_meets_a_torn_commit_says_what_to_do(folder: Path) -> None:
    """Fault 4, kind: only the holder of the lease moves it aside."""
    (folder / commit_name(3)).write_bytes(bytes(500))
    with pytest.raises(
        LogSchemaError, match=r"00000000000000000003\.json: torn, .* `tc-ray log vacuum`, moves it aside"
    ):
        MistakeLog(folder)
    Ledger(folder, writers=1, run="test")
    assert rounds_in(folder) == [1, 1]


def test_checkpoints_of_the_table_are_on_the_disk_before_they_are_seen(
    folder: Path, disk: PageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4, kind: its name comes after its sync, and one whose sync failed never gets it."""
    monkeypatch.setattr(store, "_CHECKPOINT_COMMITS", 1)
    ledger = Ledger(folder, writers=1, run="test")
    for sequence in range(2, 6):
        if sequence == 3:
            disk.fail[".checkpoint.parquet"] = OSError(errno.EIO, "Input/output error")
        ledger.commit(written(folder, 1 + sequence, 1 + sequence, sequence=sequence))
    names = sorted(path.name.lstrip("0") for path in folder.glob("_delta_log/*.checkpoint.parquet"))
    assert names == ["4.checkpoint.parquet", "6.checkpoint.parquet", "7.checkpoint.parquet"]
    assert not (folder / "_tc_ray" / "checkpoint.writing").exists()
    disk.cut_power()
    assert not repair(Location(folder))
    assert rounds_in(folder) == sorted([*range(1, 7)] * 2)
    # and it is used: without the commits that it sums up the table opens all the same
    for version in range(6):
        (folder / commit_name(version)).unlink()
    assert len(DeltaTable(folder).file_uris()) == 6
