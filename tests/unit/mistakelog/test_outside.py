"""A table that others have made names files: none leads out of its folder, for reading, moving, writing or removing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tc_ray.inspection.source import find_log
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.maintain.quarantine import set_aside
from tc_ray.mistakelog.maintain.vacuum import vacuum_log
from tc_ray.mistakelog.maintain.verify import verify_log
from tc_ray.mistakelog.read.reader import LogTail, MistakeLog
from tc_ray.mistakelog.rows.schema import LogSchemaError
from tc_ray.mistakelog.table.commits import commit_name
from tc_ray.mistakelog.table.data_file import BadFileError
from tc_ray.mistakelog.table.location import Location, OutsideError, check_data_name
from tc_ray.mistakelog.table.store import LogStore
from tests.support.mistakelog_samples import merge_all, metadata
from tests.unit.mistakelog.test_ledger import written


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Rounds 1 to 4 in two files; the second one lies outside too, beside other files."""
    folder = tmp_path / "table" / "log"
    LogStore.create(folder, metadata())
    ledger = Ledger(folder, writers=1, run="test")
    ledger.begin_attempt(0, 1)
    for sequence, first in enumerate((1, 3)):
        ledger.commit(written(folder, first, first + 1, sequence=sequence))
    (tmp_path / "outside").mkdir()
    second = sorted(folder.glob("*.parquet"))[1]
    (tmp_path / "outside" / "theirs.parquet").write_bytes(second.read_bytes())
    (tmp_path / "outside" / "broken.parquet").write_bytes(b"not what was committed")
    return folder


USES: dict[str, Callable[[Path], object]] = {
    "read": lambda log: MistakeLog(log).records(),
    "tail": lambda log: LogTail(log).poll(),
    "verify": lambda log: verify_log(log),
    "quarantine": lambda log: verify_log(log, quarantine=True),
    "merge": lambda log: merge_all(log),
    "begin_attempt": lambda log: Ledger(log, writers=1, run="test").begin_attempt(3, 1),
    "begin_attempt from the start": lambda log: Ledger(log, writers=1, run="test").begin_attempt(0, 1),
    "vacuum": lambda log: vacuum_log(log, orphan_seconds=0, grace_seconds=0),
    "ledger quarantine": lambda log: Ledger(log, writers=1, run="test").quarantine(second_name(log), "x"),
    "set_aside": lambda log: set_aside(LogStore(log), [BadFileError(second_name(log), "x")], numbers={}),
}


def second_name(log: Path) -> str:
    added = [json.loads(line).get("add") for line in (log / commit_name(3)).read_text().splitlines()]
    return str(next(add["path"] for add in added if add))


NAMES = [
    "../../outside/{file}",
    "%2e%2e/%2E%2e/outside/{file}",
    "ABSOLUTE/outside/{file}",
    "file://ABSOLUTE/outside/{file}",
    "..%2f..%2Foutside/{file}",
    "sub/../../../outside/{file}",
    "_delta_log/00000000000000000000.json",
    "_tc_ray/quarantine/quarantine.jsonl",
]


@pytest.mark.parametrize(
    ("use", "name", "file"),
    [("read", name, "theirs.parquet") for name in NAMES]
    + [(use, name, "theirs.parquet") for use in USES if use != "read" for name in NAMES[:2]]
    + [(use, name, "broken.parquet") for use in ("quarantine", "begin_attempt") for name in NAMES[:3]],
)
def test_names_that_lead_out_of_the_table_are_refused(
    log: Path, tmp_path: Path, name: str, use: str, file: str
) -> None:
    """Fault 8: `verify --quarantine` moved, and `begin_attempt` wrote, files outside."""
    (second,) = [path.name for path in log.glob("*.parquet") if "00000003" in path.name]
    path = name.format(file=file).replace("ABSOLUTE", str(tmp_path))
    commit = log / commit_name(3)
    commit.write_text(commit.read_text().replace(json.dumps(second), json.dumps(path)))
    before = content(tmp_path)
    with pytest.raises(
        LogSchemaError, match=r"this is not a log of tc-ray; nothing of it is read or changed"
    ) as refused:
        USES[use](log)
    assert repr(path) in str(refused.value)
    after = {key: value for key, value in content(tmp_path).items() if not key.startswith("table/log/_")}
    assert after == {key: value for key, value in before.items() if not key.startswith("table/log/_")}


@pytest.mark.parametrize("use", ["read", "tail", "verify", "quarantine", "merge", "begin_attempt", "ledger quarantine"])
def test_links_that_lead_out_of_the_table_are_refused(log: Path, tmp_path: Path, use: str) -> None:
    """Fault 8: the name is one of ours, the file somebody else's."""
    (second,) = [path for path in log.glob("*.parquet") if "00000003" in path.name]
    second.unlink()
    second.symlink_to(tmp_path / "outside" / "theirs.parquet")
    before = content(tmp_path / "outside")
    with pytest.raises(OutsideError, match="leads out of the log's folder"):
        USES[use](log)
    assert content(tmp_path / "outside") == before
    assert not list(log.glob("*-cut*")) and not list(log.glob("*-merged-*"))


@pytest.mark.parametrize("folder", ["_tc_ray", "_tc_ray/quarantine"])
def test_folders_of_a_log_that_lead_elsewhere_are_refused(log: Path, tmp_path: Path, folder: str) -> None:
    """Fault 8, kind: what tc-ray itself writes beside the table."""
    damaged = min(log.glob("*.parquet"))
    damaged.write_bytes(b"damaged")
    (log / folder).parent.mkdir(exist_ok=True)
    (log / folder).symlink_to(tmp_path / "outside")
    before = content(tmp_path / "outside")
    for use in ("quarantine", "vacuum") if folder == "_tc_ray" else ("quarantine",):
        with pytest.raises(OutsideError):
            USES[use](log)
    assert content(tmp_path / "outside") == before and damaged.exists()


def test_no_file_operation_leaves_the_location(tmp_path: Path) -> None:
    """Fault 8, kind: every door of `Location`, with every form of name."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "inside").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "log" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "log" / "folder").symlink_to(tmp_path)
    place = Location(tmp_path / "log")
    for name in ("../secret", str(tmp_path / "secret"), "link", "folder/secret", "x/../../secret"):
        for door in (
            place.read,
            place.buffer,
            place.touch,
            place.delete,
            place.size,
            place.modified,
            place.open_output,
            lambda name: place.write(name, b"y"),
            lambda name: place.rename(name, "new"),
            lambda name: place.rename("inside", name),
        ):
            with pytest.raises(OutsideError):
                door(name)
    assert (tmp_path / "secret").read_bytes() == b"secret" and (tmp_path / "log" / "inside").exists()
    for good in ("a.parquet", "part-0000-a%20b.parquet", "year=1/a..b.parquet"):
        check_data_name("log", good)
    for wrong in ("", ".", "a//b", "/a", "a/", "s3://b/a", "C:/a", "a\0b", "%00a"):
        with pytest.raises(OutsideError):
            check_data_name("log", wrong)


def test_the_folder_of_a_log_may_be_a_link_itself(log: Path, tmp_path: Path) -> None:
    """Its data on another disk: that is the user's own doing."""
    (tmp_path / "run").symlink_to(log)
    with MistakeLog(tmp_path / "run") as opened:
        assert len(opened.records()) == 8
    assert verify_log(tmp_path / "run", quarantine=True).good


def test_a_foreign_folder_does_not_say_where_credentials_go(tmp_path: Path) -> None:
    """Fault 8: `log stats` sent the caller's S3 credentials to the endpoint that the folder named."""
    (tmp_path / "config.yaml").write_text(
        'log: {path: s3://bucket/log, storage_options: {aws_endpoint_url: http://evil.example, aws_region: "x\\u001b[2J"}}\n'
    )
    place = find_log(str(tmp_path))
    assert (place.uri, place.options) == ("s3://bucket/log", {})
    assert "aws_endpoint_url, aws_region" in place.note and "--storage-option aws_endpoint_url=..." in place.note
    given = find_log(str(tmp_path), ["aws_endpoint_url=http://mine.example"])
    assert given.options == {"aws_endpoint_url": "http://mine.example"} and "aws_endpoint_url" not in given.note
    assert find_log(str(tmp_path), ["aws_endpoint_url=a", "aws_region=b"]).note == ""
    (tmp_path / "config.yaml").write_text("log: {path: s3://bucket/log, storage_options: [a]}\n")
    assert find_log(str(tmp_path)).note == ""
