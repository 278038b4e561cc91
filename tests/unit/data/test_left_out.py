"""What is missing from a held-out part is counted: in its file, in the report's lines, in its Markdown and its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tc_ray.config.data import DataSection
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import LeftOut, PreparedData
from tc_ray.data.prepared.prepare import prepare, prepare_test_file
from tc_ray.evaluation.decode import read_counted
from tc_ray.evaluation.report import Report
from tc_ray.evaluation.statistics import Comparison
from tests.support.data_cases import SUMS, lines
from tests.support.tiny_model import make_tokenizer

LONG = [{"prompt": "w " * 300 + str(i), "completion": "c"} for i in range(3)]
TEST = [*({"prompt": f"t{i}", "completion": str(i)} for i in range(6)), *LONG, {"prompt": "", "completion": "c"}]


def prepared(folder: Path, **values: Any) -> PreparedData:
    config = DataSection(template="plain", plain_template="{prompt}>", max_bad_fraction=0.2, **values)
    return prepare(Encoder(config, make_tokenizer(), 1), folder / "out")


def report(rows: int, missing: LeftOut, validation: LeftOut | None = None) -> Report:
    compared = Comparison.of([True] * rows, [True] * rows)
    left_out = {"test": missing, "validation": validation or LeftOut()}
    return Report("t.jsonl", "logits", 0.0, "own", compared, None, None, left_out=left_out, validation_rows=9)


def test_rows_of_own_files_are_counted_from_file_to_report(tmp_path: Path) -> None:
    """Fault 13: prompts above data.cutoff_tokens left the test and the validation set without a word."""
    train, test = lines(tmp_path / "t.jsonl", SUMS), lines(tmp_path / "x.jsonl", TEST)
    data = prepared(tmp_path, train=str(train), test=str(test), validation=str(test))
    for part in (data.file("test"), data.file("validation")):
        rows, missing = read_counted(part)
        assert len(rows) == 6 and missing == LeftOut(prompt_too_long=3, bad=1)
    rows, missing = read_counted(data.file("test"), 4)
    assert len(rows) == 4 and missing == LeftOut(3, 1, not_measured=2)

    other = prepare_test_file(
        Encoder(DataSection(template="plain", plain_template="{prompt}>", max_bad_fraction=0.2), make_tokenizer(), 1),
        str(test),
        tmp_path / "eval",
    )
    assert read_counted(other.file("test"))[1] == LeftOut(3, 1), "tc-ray eval --data"


def test_the_report_says_so_beside_the_accuracy(tmp_path: Path) -> None:
    """Fault 13: "3 of 6 test rows" in the line of the accuracy, and why; the same for validation."""
    found = report(3, LeftOut(prompt_too_long=2, bad=1), LeftOut(prompt_too_long=1))
    said = found.lines()
    assert all("3 of 6" in line for line in said if line.startswith(("Pilot", "fused")))
    why = "3 of 6 test rows (2 with a prompt longer than data.cutoff_tokens, 1 bad, see quarantine.jsonl)"
    assert sum(line.startswith(f"{why} of t.jsonl: 0 wins") for line in said) == 1
    chosen_on = "9 of 10 validation rows (1 with a prompt longer than data.cutoff_tokens)"
    assert f"lambda was chosen on {chosen_on}" in said
    assert why in found.markdown() and chosen_on in found.markdown()
    found.save(tmp_path)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["left_out"]["test"]["prompt_too_long"] == 2 and saved["left_out"]["validation"]["prompt_too_long"] == 1


def test_rows_that_are_not_measured_are_named_as_that(tmp_path: Path) -> None:
    data = prepared(tmp_path, train=str(lines(tmp_path / "t.jsonl", [*SUMS, *LONG])))
    rows, missing = read_counted(data.file("test"))
    assert missing == LeftOut() and len(rows) == 6, "what is left out before the cut was no test row"
    assert LeftOut(not_measured=4).counted(2, "test") == "2 of 6 test rows (4 not measured: fusion.max_test_rows)"
    assert LeftOut().counted(5, "test") == "5 test rows"
    assert all("6 of" not in line for line in report(6, missing).lines())


def test_a_bad_line_of_sequences_is_a_missing_row_of_its_user(tmp_path: Path) -> None:
    users = [f"u{i} {' '.join(f'i{(i + n) % 30}' for n in range(5))}" for i in range(30)]
    file = lines(tmp_path / "s.txt", [*users, "u31 i1 i2"])
    data = prepared(tmp_path, train=str(file), format="sequences")
    assert read_counted(data.file("test"))[1] == LeftOut(bad=1) == read_counted(data.file("validation"))[1]
