"""Rows taken out of a log: the same rows, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tc_ray.inspection.samples import ExportError, export_jsonl
from tc_ray.inspection.source import LogNotFoundError, find_log
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tests.support.inspection_samples import make_examples, make_log
from tests.support.tiny_model import make_tokenizer

EXAMPLES = make_examples(samples=5, epochs=3)


@pytest.fixture(params=["top-k", "dense"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> MistakeLog:
    return MistakeLog(make_log(tmp_path / "log", EXAMPLES, dense=request.param == "dense"))


def test_json_lines_hold_the_rows(log: MistakeLog, tmp_path: Path) -> None:
    texts = TokenTexts(make_tokenizer(), "")
    out = tmp_path / "rows.jsonl"
    assert export_jsonl(log, out, texts) == len(EXAMPLES)
    assert export_jsonl(log, tmp_path / "deep" / "some.jsonl", texts, (2, 4)) == sum(
        2 <= e.round <= 4 for e in EXAMPLES
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(EXAMPLES)
    for line, example in zip(lines, EXAMPLES, strict=True):
        assert line["run"] == log.metadata.run and line["target_start"] == len(example.prompt)
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


def test_nothing_is_replaced_and_nothing_half_is_left(log: MistakeLog, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("mine")
    with pytest.raises(ExportError, match="exists already"):
        export_jsonl(log, out, TokenTexts(None, ""))
    broken = tmp_path / "log" / log.files[1].name
    broken.write_bytes(b"PAR1")
    with pytest.raises(ExportError, match=r"1 files of the log are damaged .* nothing was exported"):
        export_jsonl(log, tmp_path / "b", TokenTexts(None, ""))
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
