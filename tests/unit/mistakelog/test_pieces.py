"""Records piece by piece: the same rows as at once, none of a file whose bytes are not those committed."""

from __future__ import annotations

import dataclasses
import threading
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tc_ray.config.schema import RunConfig
from tc_ray.copilot.from_log import Replay
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table import data_file as datafile
from tc_ray.mistakelog.table.data_file import (
    BadFileError,
    DataFile,
    ParquetPart,
    file_name,
    read_file,
    read_pieces,
)
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tests.support.mistakelog_samples import assert_same, metadata, random_records

ROUNDS, ROWS = 12, 7


def batch(round: int, rank: int = 0) -> Records:
    return random_records(ROWS, round=round, rank=rank, first_sample=100 * round + 10 * rank)


def write_file(folder: Path, rounds: range, rank: int = 0) -> DataFile:
    """A file with a row group a round."""
    part = ParquetPart(Location(folder), file_name(rounds[0], rank, 1, 0), "none", metadata().to_configuration())
    for round in rounds:
        part.write(batch(round, rank).to_arrow("test"))
    rows, done = part.rows, part.finish()
    first, last = rounds[0], rounds[-1]
    return DataFile(part.name, rows, done.size, first, last, rank, 1, first, done.crc32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of rounds 1 to 12: files of 4, 3 and 5 rounds of one rank, one of rounds 3 to 9 of another. Pieces are small."""
    monkeypatch.setattr(datafile, "ROW_GROUP_BYTES", 1)
    store = LogStore.create(tmp_path, metadata())
    files = [write_file(tmp_path, rounds) for rounds in (range(1, 5), range(5, 8), range(8, 13))]
    files.append(write_file(tmp_path, range(3, 10), rank=1))
    store.commit(add=files, numbers={"test": 1})
    monkeypatch.setattr(datafile, "_PIECE_BYTES", 2000)  # of some 10 kB a file
    return tmp_path


@pytest.mark.parametrize("rounds", [None, (1, 12), (4, 8), (6, 6), (13, 20)])
def test_pieces_are_the_rows(folder: Path, rounds: tuple[int, int] | None) -> None:
    with MistakeLog(folder) as log:
        pieces = list(log.pieces(rounds))
        if rounds == (13, 20):
            assert pieces == []
            return
        assert len(pieces) > len({file.name for file, _ in pieces}), "no file came in pieces"
        assert_same(Records.concat([records for _, records in pieces]), log.records(rounds))
        names = [file.name for file, _ in pieces]
        assert list(dict.fromkeys(names)) == [file.name for file in log.files if file.name in names]
        assert not log.bad_files


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
def test_pieces_are_cut_at_batches(folder: Path, rows: int) -> None:
    with MistakeLog(folder) as log:
        sizes: dict[str, list[int]] = {}
        for file, records in log.pieces(batch=rows):
            sizes.setdefault(file.name, []).append(len(records))
        assert {name: sum(found) for name, found in sizes.items()} == {file.name: file.rows for file in log.files}
        assert all(size % rows == 0 for found in sizes.values() for size in found[:-1])


@pytest.mark.parametrize("place", ["first group", "last group", "footer"])
def test_nothing_of_a_damaged_file_is_delivered(folder: Path, place: str) -> None:
    """Also if its first pieces are whole: the whole file is checked before any of it is parsed."""
    with MistakeLog(folder) as log:
        victim = log.files[0]
        path = folder / victim.name
        whole = pq.ParquetFile(path).metadata
        group = {"first group": 0, "last group": whole.num_row_groups - 1}.get(place)
        column = whole.row_group(group or 0).column(whole.schema.names.index("rationale"))
        at = victim.bytes - 40 if group is None else column.data_page_offset + column.total_compressed_size - 5
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)
        pieces = list(log.pieces())
        assert victim.name not in {file.name for file, _ in pieces}
        assert [bad.name for bad in log.bad_files] == [victim.name] and "CRC-32" in log.bad_files[0].reason
        assert sum(len(records) for _, records in pieces) == sum(file.rows for file in log.files[1:])


def test_checksums_are_those_of_zlib(folder: Path) -> None:
    """They stand in every log ever written: whatever computes them must give the same numbers."""
    with MistakeLog(folder) as log:
        assert len(log.files) == 4
        for file in log.files:
            assert file.crc32 == zlib.crc32((folder / file.name).read_bytes())


@pytest.mark.parametrize(
    ("field", "reason"), [("size", "committed with 3"), ("rows", "rows, committed with 3"), ("crc32", "CRC-32")]
)
def test_each_statement_of_the_commit_is_checked(folder: Path, field: str, reason: str) -> None:
    file = LogStore(folder).files()[0]
    committed = file.committed._replace(**{field: 3})
    with pytest.raises(BadFileError, match=reason):
        read_file(Location(folder), file.name, committed)
    with pytest.raises(BadFileError, match=reason):
        next(read_pieces(Location(folder), file.name, committed, rows=1))


def test_leaving_early_ends_the_threads(folder: Path) -> None:
    with MistakeLog(folder) as log:
        for _, _ in log.pieces():
            break
        for _ in log.tables():
            break
    assert not [thread for thread in threading.enumerate() if thread.name == "mistake-log-read"]


def test_replay_takes_each_round_whole(folder: Path) -> None:
    """From the first round, and (a training that goes on) from one in the middle of files."""
    config = RunConfig.model_validate({"copilot": {"buffer_rounds": 1, "steps_per_round": 1, "batch_size": 400}})
    with MistakeLog(folder) as log:
        everything = log.records()
        for start in (1, 6):
            source = Replay(log, config)
            for round in range(start, ROUNDS + 1):
                assert source.rounds_for(round - 1) == round
                drawn = source.buffer.draw(400, (1, round))
                assert set(drawn.round.tolist()) == {round}
                expected = set(everything.sample_id[everything.round == round].tolist())
                assert set(drawn.sample_id.tolist()) == expected
                at = int(drawn.sample_id[0])
                one = everything.select(np.flatnonzero(everything.sample_id == at))
                assert_same(dataclasses.replace(drawn.select([0])), one)
