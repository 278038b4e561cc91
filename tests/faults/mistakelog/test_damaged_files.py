"""500 damaged data files, nine kinds of damage: no reader crashes, none delivers an altered row, each file is counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.table.data_file import DataFile, ParquetPart, file_name
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tests.support.mistakelog_samples import assert_same, metadata, random_records

FILES, DAMAGED, ROWS = 600, 500, 2


def batch(round: int) -> Records:
    return random_records(ROWS, round=round, first_sample=10 * round)


def write_log(folder: Path) -> None:
    """One file a round, in a few commits."""
    store = LogStore.create(folder, metadata())
    files = []
    for round in range(1, FILES + 1):
        part = ParquetPart(Location(folder), file_name(round, 0, 1, round), "none", metadata().to_configuration())
        part.write(batch(round).to_arrow("test"))
        done = part.finish()
        files.append(DataFile(part.name, ROWS, done.size, round, round, 0, 1, round, done.crc32))
    for at in range(0, FILES, 200):
        store.commit(add=files[at : at + 200], numbers={"test": at})


Damage = Callable[[Path, random.Random], None]


def cut(path: Path, dice: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(1, len(content))])


def flip_bits(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 1, 2, 20])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def empty(path: Path, dice: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, dice: random.Random) -> None:
    path.unlink()


def noise(path: Path, dice: random.Random) -> None:
    path.write_bytes(dice.randbytes(path.stat().st_size))


def zeros_inside(path: Path, dice: random.Random) -> None:
    """As a power cut leaves a file whose length was saved before its content."""
    content = bytearray(path.read_bytes())
    at = dice.randrange(len(content) - 64)
    content[at : at + 64] = (
        bytes(x ^ 0xFF for x in content[at : at + 64]) if not any(content[at : at + 64]) else bytes(64)
    )
    path.write_bytes(content)


def foreign_parquet(path: Path, dice: random.Random) -> None:
    pq.write_table(pa.table({"a": [dice.random() for _ in range(50)], "b": ["x"] * 50}), path)


def wrong_types(path: Path, dice: random.Random) -> None:
    table = pq.read_table(path, partitioning=None)
    at = table.schema.get_field_index("token_loss")
    pq.write_table(table.set_column(at, "token_loss", pa.array(["many"] * len(table))), path)


def other_rows(path: Path, dice: random.Random) -> None:
    """A well-formed file of this log, with rows of another round."""
    pq.write_table(random_records(ROWS, round=7, first_sample=3).to_arrow("test"), path)


DAMAGES: list[Damage] = [
    cut,
    flip_bits,
    empty,
    remove,
    noise,
    zeros_inside,
    foreign_parquet,
    wrong_types,
    other_rows,
]


def test_500_damaged_files(tmp_path: Path) -> None:
    dice = random.Random(9)
    write_log(tmp_path)
    tail = LogTail(tmp_path)
    victims = dice.sample(range(1, FILES + 1), DAMAGED)
    names = {round: file_name(round, 0, 1, round) for round in range(1, FILES + 1)}
    done: dict[str, int] = {}
    for at, round in enumerate(victims[:-40]):
        damage = DAMAGES[at % len(DAMAGES)]
        damage(tmp_path / names[round], dice)
        done[damage.__name__] = done.get(damage.__name__, 0) + 1
    for one, other in zip(
        victims[-40::2], victims[-39::2], strict=True
    ):  # swapped: whole files under each other's name
        (tmp_path / names[one]).rename(tmp_path / "x")
        (tmp_path / names[other]).rename(tmp_path / names[one])
        (tmp_path / "x").rename(tmp_path / names[other])
    assert len(done) == len(DAMAGES) and sum(done.values()) + 40 == DAMAGED
    bad = {names[round] for round in victims}
    whole = [round for round in range(1, FILES + 1) if names[round] not in bad]

    log = MistakeLog(tmp_path)
    assert_same(log.records(), Records.concat([batch(round) for round in whole]))
    assert {error.name for error in log.bad_files} == bad and len(log.bad_files) == DAMAGED
    assert all(error.reason for error in log.bad_files)
    some = MistakeLog(tmp_path)
    assert some.arrow(columns=["sample_id"])["sample_id"].to_pylist() == [
        10 * round + i for round in whole for i in range(ROWS)
    ]
    assert {error.name for error in some.bad_files} == bad

    pieces = MistakeLog(tmp_path)
    assert_same(Records.concat([records for _, records in pieces.pieces()]), log.records())
    assert {error.name for error in pieces.bad_files} == bad

    update = tail.poll()
    assert {error.name for error in update.bad} == bad
    assert len(update.new) == len(whole)
    for name, records in update.new:
        assert names[int(records.round[0])] == name
        assert_same(records, batch(int(records.round[0])))
    assert tail.poll().bad == [], "counted once"

    result = verify_log(tmp_path)
    assert {error.name for error in result.bad} == bad and result.rows == len(whole) * ROWS
    quarantined = verify_log(tmp_path, quarantine=True)
    assert len(quarantined.quarantined) == DAMAGED
    assert verify_log(tmp_path).good
    assert Ledger(tmp_path, writers=1, run="test").state().rows == len(whole) * ROWS
    after = MistakeLog(tmp_path)
    assert sorted(after.records().round.tolist()) == sorted(np.repeat(whole, ROWS).tolist())
    assert after.bad_files == []
