"""What a power cut leaves in the transaction log is moved aside; what only damage can leave is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.commits import commit_name
from tc_ray.mistakelog.table.data_file import DataFile
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.repair import TORN_FOLDER, repair, write_checkpoint
from tc_ray.mistakelog.table.store import LogStore
from tests.support.mistakelog_samples import metadata
from tests.unit.mistakelog.test_ledger import written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log of two committed files, versions 0 to 3."""
    LogStore.create(tmp_path / "log", metadata())
    ledger = Ledger(tmp_path / "log", writers=1, run="test")
    ledger.begin_attempt(0, 1)
    for sequence in range(2):
        ledger.commit(written(tmp_path / "log", 1 + sequence, 1 + sequence, sequence=sequence))
    return tmp_path / "log"


@pytest.mark.parametrize("left", [0, 1, 200])
def test_a_torn_last_commit_was_never_acknowledged(folder: Path, left: int) -> None:
    last = folder / commit_name(3)
    last.write_bytes(last.read_bytes()[:left])
    ledger = Ledger(folder, writers=1, run="test")
    assert (ledger.state().version, ledger.state().round) == (2, 1)
    assert (folder / TORN_FOLDER / last.name).stat().st_size == left
    # the writer, which never got its answer, hands the file over again
    ledger.commit(written(folder, 2, 2, sequence=1))
    with MistakeLog(folder) as log:
        assert sorted(set(log.records().round.tolist())) == [1, 2]
    assert repair(Location(folder)) is None


def test_a_torn_first_commit_is_made_anew(tmp_path: Path) -> None:
    LogStore.create(tmp_path, metadata())
    (tmp_path / commit_name(0)).write_bytes(b"")
    assert LogStore.create(tmp_path, metadata()).version == 0


def test_damage_before_whole_commits_is_refused_by_name(folder: Path) -> None:
    (folder / commit_name(2)).write_bytes(b"\x00" * 100)
    with pytest.raises(LogSchemaError, match=r"00000000000000000002\.json: damaged commit .* restore the file"):
        Ledger(folder, writers=1, run="test")


def test_torn_checkpoints_of_the_table_are_done_without(folder: Path) -> None:
    write_checkpoint(Location(folder), LogStore(folder)._table)
    (checkpoint,) = folder.glob("_delta_log/*.checkpoint.parquet")
    checkpoint.write_bytes(checkpoint.read_bytes()[:-20])
    assert Ledger(folder, writers=1, run="test").state().round == 2
    # and the pointer to it
    assert {path.name for path in (folder / TORN_FOLDER).iterdir()} == {checkpoint.name, "_last_checkpoint"}


def test_keys_of_a_later_version_are_no_damage(folder: Path) -> None:
    """A fault found by attack: an unknown key in the newest commit had its rows moved aside as torn."""
    newest = folder / commit_name(3)
    actions = [json.loads(line) for line in newest.read_text().splitlines()]
    (ours,) = [action["commitInfo"]["tc_ray"] for action in actions if "commitInfo" in action]
    ours["files"][0]["a_later_field"] = {"any": "thing"}
    newest.write_text("".join(json.dumps(action) + "\n" for action in actions))
    state = Ledger(folder, writers=1, run="test").state()
    assert (state.version, state.round, state.rows) == (3, 2, 4)
    assert not (folder / TORN_FOLDER).exists()
    with MistakeLog(folder) as log:
        assert sorted(log.records().round.tolist()) == [1, 1, 2, 2]


def test_a_checkpoint_that_opens_but_cannot_be_read_is_moved_aside(folder: Path) -> None:
    """A fault found by attack: delta-rs opens a table without the pages of `txn`, so a start ended at zeros in them."""
    write_checkpoint(Location(folder), LogStore(folder)._table)
    (checkpoint,) = folder.glob("_delta_log/*.checkpoint.parquet")
    group, content = pq.ParquetFile(checkpoint).metadata.row_group(0), bytearray(checkpoint.read_bytes())
    for column in (group.column(i) for i in range(group.num_columns)):
        if column.path_in_schema.startswith("txn."):
            first = column.dictionary_page_offset or column.data_page_offset
            content[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    checkpoint.write_bytes(content)
    assert LogStore(folder).version == 3, "delta-rs opens it"
    assert Ledger(folder, writers=1, run="test").state().round == 2
    assert {path.name for path in (folder / TORN_FOLDER).iterdir()} == {checkpoint.name, "_last_checkpoint"}


def test_drop_counts_survive_restarts_and_follow_the_watermark(tmp_path: Path) -> None:
    LogStore.create(tmp_path, metadata())
    ledger = Ledger(tmp_path, writers=1, run="test")
    ledger.begin_attempt(0, 1)
    ledger.commit(DataFile(None, 0, 0, 1, 3, 0, 1, 0, dropped={1: 4, 3: 2}))
    ledger.commit(DataFile(None, 0, 0, 4, 5, 0, 1, 1, dropped={5: 8}))
    assert ledger.state().dropped == 14
    assert Ledger(tmp_path, writers=1, run="test").state().dropped == 14
    ledger.begin_attempt(3, 1)  # round 5 is trained again
    assert ledger.state().dropped == 6
    assert Ledger(tmp_path, writers=1, run="test").state().dropped == 6
