"""Data in an object store: a real S3 server, read where it is, and named by its addresses."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.config.data import DataSection
from tc_ray.data.source.find import find_sources, part_files
from tc_ray.data.source.readers import iter_records, shares
from tc_ray.data.source.records import DataError
from tests.support.data_writers import HELD, SUMS
from tests.support.object_store import new_log_uri, object_store


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of a bucket with a folder of data; the environment has what reaches it."""
    import boto3

    with object_store() as options, pytest.MonkeyPatch.context() as patch:
        for name in ("endpoint_url", "access_key_id", "secret_access_key", "region"):
            patch.setenv(f"AWS_{name}".upper(), options[f"aws_{name}"])
        address = "/".join(new_log_uri(options).split("/")[:3])
        client = boto3.client("s3", endpoint_url=options["aws_endpoint_url"])
        parquet = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(SUMS), parquet)
        text = "".join(json.dumps(row) + "\n" for row in HELD).encode()
        for key, content in {
            "rows/train-0 (a).jsonl.gz": gzip.compress(text),
            "rows/train-1.parquet": parquet.getvalue(),
            "rows/deep/test.jsonl": text,
            "rows/README.md": b"# rows",
        }.items():
            client.put_object(Bucket=address.removeprefix("s3://"), Key=key, Body=content)
        yield address


def values(files: Any) -> list[Any]:
    return [record.value for file in files for record in iter_records(file)]


def test_a_folder_a_pattern_and_a_file_of_a_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_sources(DataSection(train=f"{bucket}/rows"))
    assert [file.name for file in found.files["train"]] == ["train-0 (a).jsonl.gz", "train-1.parquet"]
    assert values(found.files["train"]) == [*HELD, *SUMS] and values(found.files["test"]) == HELD
    assert shares(found.files["train"], 4) == found.files["train"], "read where it is, once"
    assert "test rows by their names: deep/test.jsonl" in found.notes
    assert f"left out of {bucket}/rows: README.md" in found.notes
    one = find_sources(DataSection(train=f"{bucket}/rows/*.parquet")).files
    assert values(one["train"]) == SUMS and not one["test"]
    assert find_sources(DataSection(train=f"{bucket}/rows/train-1.parquet")).files["train"] == one["train"]
    server = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = f"?endpoint_override={server}&scheme=http"
    assert values(find_sources(DataSection(train=f"{bucket}/rows/*.parquet{options}")).files["train"]) == SUMS
    monkeypatch.undo()
    assert values(part_files(f"{bucket}/rows/**/*.jsonl", "test", DataSection(), [])) == HELD


def test_what_a_store_does_not_have_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=rf"data\.train: no .* file at {bucket}/none; correct the path"):
        find_sources(DataSection(train=f"{bucket}/none"))
    with pytest.raises(DataError, match=r"^an address of data holds a key: leave it out"):
        find_sources(DataSection(train="s3://key:secret@bucket/rows"))
    with pytest.raises(DataError, match=r"^ftp://x/y: cannot be read: .*Unrecognized filesystem"):
        find_sources(DataSection(train="ftp://x/y"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=rf"^{bucket}/rows: cannot be read: .*AWS_ENDPOINT_URL"):
        find_sources(DataSection(train=f"{bucket}/rows"))
