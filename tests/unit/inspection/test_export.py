"""Rows taken out of a log: the same rows, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tc_ray.inspection.export import FIELDS, ExportError, export_jsonl, export_parquet
from tc_ray.inspection.source import LogNotFoundError, find_log
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.records import Records
from tc_ray.mistakelog.rows.schema import LogMetadata
from tests.support.inspection_samples import DIM, make_examples, make_log
from tests.support.mistakelog_samples import assert_same
from tests.support.tiny_model import make_tokenizer

EXAMPLES = make_examples(samples=5, epochs=3)


@pytest.fixture(params=["top-k", "dense"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> MistakeLog:
    return MistakeLog(make_log(tmp_path / "log", EXAMPLES, dense=request.param == "dense"))


def test_parquet_files_hold_the_rows_and_can_be_read_alone(log: MistakeLog, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    done = export_parquet(log, out)
    assert (done.rows, done.bytes) == (len(EXAMPLES), out.stat().st_size)
    table = pq.read_table(out)
    assert_same(Records.from_arrow(table), log.records())
    assert (
        LogMetadata.from_configuration(
            {key.decode(): value.decode() for key, value in table.schema.metadata.items()}, "here"
        )
        == log.metadata
    )


def test_one_parquet_file_of_some_rounds_and_columns(log: MistakeLog, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "some.parquet"
    export_parquet(log, out, (2, 4), ["sample_id", "token_loss"])
    table = pq.read_table(out)
    assert table.column_names == ["sample_id", "token_loss"]
    assert table["sample_id"].to_pylist() == [e.sample for e in EXAMPLES if 2 <= e.round <= 4]
    assert export_parquet(log, tmp_path / "none.parquet", (900, 901)).rows == 0
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_json_lines_hold_the_rows(log: MistakeLog, tmp_path: Path) -> None:
    texts = TokenTexts(make_tokenizer(), "")
    out = tmp_path / "rows.jsonl"
    export_jsonl(log, out, texts)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(EXAMPLES)
    for line, example in zip(lines, EXAMPLES, strict=True):
        assert set(line) == set(FIELDS) - {"states", "states_first"}
        assert (line["round"], line["sample_id"], line["seen"]) == (example.round, example.sample, example.seen)
        assert line["input_ids"] == example.prompt + example.answer
        assert line["prompt"] == texts.sequence(example.prompt) and line["answer"] == texts.sequence(example.answer)
        assert line["loss"] == pytest.approx(example.loss.mean(), rel=1e-5)
        assert line["wrong"] == (~example.correct).sum()
        for place, token in enumerate(line["tokens"]):
            assert token["id"] == example.answer[place] and token["text"] == texts.raw(token["id"])
            assert token["p"] == pytest.approx(example.p[place, token["id"]], rel=1e-4)
            assert token["error"] == pytest.approx(1 - token["p"], abs=1e-5)
            assert token["correct"] == example.correct[place]
            for other in token["instead"]:
                assert other["p"] == pytest.approx(example.p[place, other["id"]], rel=1e-4)
            assert [o["p"] for o in token["instead"]] == sorted((o["p"] for o in token["instead"]), reverse=True)


def test_states_as_numbers(log: MistakeLog, tmp_path: Path) -> None:
    texts, out = TokenTexts(None, ""), tmp_path / "rows.jsonl"
    with pytest.raises(ExportError, match="give --states too"):
        export_jsonl(log, out, texts, None, ["states"])
    export_jsonl(log, out, texts, None, ["sample_id", "states", "states_first"], states=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    records = log.records()
    for i, line in enumerate(lines):
        bits = records.rationale[records.rationale_offsets[i] : records.rationale_offsets[i + 1]]
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        assert line["states"] == values.tolist() and len(line["states"][0][0]) == DIM
        length = int(np.diff(records.seq_offsets)[i])
        assert line["states_first"] + len(line["states"]) == length - 1


def test_nothing_is_replaced_and_nothing_half_is_left(log: MistakeLog, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export_jsonl(log, out, TokenTexts(None, ""))
    with pytest.raises(ExportError, match="--columns: hat is none of run"):
        export_parquet(log, tmp_path / "a", None, ["hat"])
    broken = tmp_path / "log" / log.files[1].name
    broken.write_bytes(b"PAR1")
    for export in (
        lambda: export_parquet(log, tmp_path / "b"),
        lambda: export_jsonl(log, tmp_path / "c", TokenTexts(None, "")),
    ):
        with pytest.raises(ExportError, match=r"1 files of the log are damaged .* nothing was exported"):
            export()
    assert out.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "rows.jsonl"]


# which log is meant --------------------------------------------------------------------------------------------------


def test_a_run_folder_and_a_log_folder_are_the_same_log(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_log(run / "log", EXAMPLES)
    (run / "config.yaml").write_text("log: {path: null, storage_options: {aws_region: here}}\n")
    by_run, by_log = find_log(str(run)), find_log(str(run / "log"))
    assert by_run.run_folder == run and by_log.run_folder == run
    assert by_run.open().version == by_log.open().version
    assert (by_run.options, by_run.note) == ({}, ""), "a local log needs none"
    assert find_log(str(run), ["aws_region=there", "a=b=c"]).options == {"aws_region": "there", "a": "b=c"}


def test_the_config_says_where_the_log_is(tmp_path: Path) -> None:
    make_log(tmp_path / "elsewhere", EXAMPLES)
    (tmp_path / "config.yaml").write_text(f"log: {{path: '{tmp_path / 'elsewhere'}'}}\n")
    place = find_log(str(tmp_path))
    assert place.uri == str(tmp_path / "elsewhere") and place.run_folder == tmp_path
    (tmp_path / "config.yaml").write_text("log: {path: 's3://bucket/log'}\n")
    assert find_log(str(tmp_path)).uri == "s3://bucket/log"
    assert find_log("gs://bucket/log").run_folder is None


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(LogNotFoundError, match="no such folder"):
        find_log(str(tmp_path / "nowhere"))
    with pytest.raises(LogNotFoundError, match="no Mistake Log in it"):
        find_log(str(tmp_path))
    (tmp_path / "config.yaml").write_text("log: {path: /nowhere/log}\n")
    with pytest.raises(LogNotFoundError, match="/nowhere/log, and no log is there"):
        find_log(str(tmp_path))
    with pytest.raises(ValueError, match="expected KEY=VALUE"):
        find_log("s3://b/l", ["region"])
