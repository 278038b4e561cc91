"""`tc-ray log` on a run folder: what it prints, its exit codes and messages."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tc_ray.cli.log import parse_rounds
from tc_ray.mistakelog.table.location import Location
from tc_ray.models.identity import tokenizer_hash
from tests.support.command_line import tc_ray, tc_ray_process
from tests.support.inspection_samples import make_examples, make_log
from tests.support.mistakelog_samples import merge_all
from tests.support.object_store import new_log_uri, object_store
from tests.support.tiny_model import make_tokenizer

EXAMPLES = make_examples(samples=6, epochs=2, vocab=258)


def tc_ray_log(*arguments: object) -> subprocess.CompletedProcess[str]:
    return tc_ray("log", *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_tokenizer().save_pretrained(folder / "pilot" / "final")
    make_log(folder / "log", EXAMPLES, tokenizer_hash=tokenizer_hash(make_tokenizer()))
    (folder / "config.yaml").write_text("run: {name: trial}\n")
    return folder


def test_stats_in_words_and_as_json(run: Path) -> None:
    words = tc_ray_log("stats", run)
    assert words.returncode == 0, words.stderr
    for text in (
        "12 rows of 6 samples",
        "1 to 6",
        "Tokens most often missed",
        "Hardest samples",
        "Calibration of the Pilot",
    ):
        assert text in words.stdout, text
    document = json.loads(tc_ray_log("stats", run / "log", "--json", "--rounds", "4:").stdout)
    assert document["rows"] == 6 and [line["round"] for line in document["by_round"]] == [4, 5, 6]
    assert document["tokenizer"] == f"tokenizer of {run / 'pilot' / 'final'}"


def test_show_a_sample_the_worst_and_a_page(run: Path, tmp_path: Path) -> None:
    shown = tc_ray_process("log", "show", run, "3")
    rounds = [e.round for e in EXAMPLES if e.sample == 3]
    assert shown.returncode == 0, shown.stderr
    assert all(f"round {number}, " in shown.stdout for number in rounds)
    assert "\x1b" not in shown.stdout, "a pipe gets no colours"
    out = tmp_path / "worst.html"
    made = tc_ray_log("show", run, "--worst", "2", "--html", out)
    assert made.returncode == 0 and "2 samples" in made.stdout
    assert out.read_text().count('class="sample"') == 2


def test_report_and_export(run: Path, tmp_path: Path) -> None:
    made = tc_ray_log("report", run, "--out", tmp_path / "r.html")
    assert made.returncode == 0, made.stderr
    assert "Mistake Log of trial" in (tmp_path / "r.html").read_text()
    out = tmp_path / "rows.jsonl"
    exported = tc_ray_log("export", run, "--out", out, "--rounds", "1:2")
    assert exported.returncode == 0 and "4 rows" in exported.stdout, exported.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = make_tokenizer()
    assert [line["answer"] for line in lines] == [tokenizer.decode(e.answer) for e in EXAMPLES if e.round <= 2]
    other = tc_ray_log("export", run, "--out", tmp_path / "rows.parquet")
    assert other.returncode == 2 and "must end in .jsonl" in other.stderr and not (tmp_path / "rows.parquet").exists()
    again = tc_ray_log("export", run, "--out", out)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_mistakes_of_the_user_end_in_one_line_and_code_2(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (("stats", tmp_path), "no Mistake Log in it"),
        (("show", run), "name a sample"),
        (("show", run, "99"), "samples are 0 to 5"),
        (("stats", run, "--rounds", "9:2"), "expected A:B"),
        (("stats", run, "--tokenizer", tmp_path), "no tokenizer can be read at"),
    ):
        result = tc_ray_log(*arguments)
        assert result.returncode == 2, arguments
        assert message in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_verify_finds_a_broken_file_and_takes_it_out(tmp_path: Path) -> None:
    folder = make_log(tmp_path / "log", EXAMPLES)
    assert tc_ray_log("verify", folder).returncode == 0
    broken = min(folder.glob("*.parquet"))
    broken.write_bytes(broken.read_bytes()[:-9])
    found = tc_ray_log("verify", folder)
    assert found.returncode == 1 and broken.name in found.stdout
    for command in (
        ("stats",),
        ("stats", "--json"),
        ("show", "--worst", "1"),
        ("report", "--out", tmp_path / "r.html"),
    ):
        gaps = tc_ray_log(command[0], folder, *command[1:])
        assert gaps.returncode == 1 and "1 damaged files were skipped" in gaps.stderr, command
    aside = tc_ray_log("verify", folder, "--quarantine")
    assert aside.returncode == 1 and broken.name in aside.stdout
    assert tc_ray_log("verify", folder).returncode == 0
    assert json.loads(tc_ray_log("stats", folder, "--json").stdout)["rows"] == sum(e.round > 3 for e in EXAMPLES)


def test_vacuum(tmp_path: Path) -> None:
    folder = make_log(tmp_path / "log", EXAMPLES, rounds_a_file=1)
    before = json.loads(tc_ray_log("stats", folder, "--json").stdout)
    merge_all(folder)
    assert len(list(folder.glob("*.parquet"))) == 7
    assert tc_ray_log("vacuum", folder, "--grace-seconds", "0", "--orphan-seconds", "0").returncode == 0
    assert len(list(folder.glob("*.parquet"))) == 1
    after = json.loads(tc_ray_log("stats", folder, "--json").stdout)
    assert before["files"] == 6 and after["files"] == 1
    assert before["by_round"] == after["by_round"]


def test_a_log_in_an_object_store(tmp_path: Path) -> None:
    with object_store() as options:
        uri = new_log_uri(options)
        make_log(tmp_path, EXAMPLES, location=Location(uri, options))
        given = [word for key, value in options.items() for word in ("--storage-option", f"{key}={value}")]
        document = json.loads(tc_ray_log("stats", uri, "--json", *given).stdout)
        assert document["rows"] == 12 and "token ids are shown" in document["tokenizer"]
        shown = tc_ray_log("show", uri, "2", *given)
        assert shown.returncode == 0 and "sample 2" in shown.stdout, shown.stderr
        assert tc_ray_log("verify", uri, *given).returncode == 0


@pytest.mark.parametrize(
    ("text", "rounds"), [(None, None), ("3:9", (3, 9)), ("3:", (3, 2**62)), (":9", (0, 9)), ("4", (4, 4))]
)
def test_spans_of_rounds(text: str | None, rounds: tuple[int, int] | None) -> None:
    assert parse_rounds(text) == rounds


@pytest.mark.parametrize("text", ["", ":", "a:b", "-1:4", "5:4", "1:2:3"])
def test_bad_spans_of_rounds(text: str) -> None:
    with pytest.raises(ValueError, match="expected A:B"):
        parse_rounds(text)
