"""Which models a folder gives, and what they are known by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tc_ray.config.data import DataSection
from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.folder import SCHEMA
from tc_ray.data.source.records import DataError, Record
from tc_ray.evaluation.rows import HeldOut, encoded_for
from tc_ray.evaluation.sources import NotFinishedError, find_source
from tc_ray.models.folder import FusionSettings
from tc_ray.run.evaluate import Asked, _leading_config, _tasks
from tests.support.evaluation_samples import source
from tests.support.tiny_model import make_tiny_llama, make_tokenizer


def pilot(folder: Path) -> Path:
    make_tokenizer().save_pretrained(make_tiny_llama(folder))
    return folder


def test_a_run_whose_copilot_failed_is_its_pilot(tmp_path: Path) -> None:
    save_config(RunConfig(), tmp_path / "config.yaml")
    pilot(tmp_path / "pilot" / "final")
    pilot(tmp_path / "export" / "pilot")
    FusionSettings(0.0, "probability", "own").write(tmp_path / "export")
    run, export = find_source(f"r={tmp_path}"), find_source(f"e={tmp_path / 'export'}")
    assert (run.models, run.run, run.no_copilot) == (("r",), tmp_path, "the run's Copilot failed")
    assert (export.models, export.weights) == (("e",), run.weights)


def test_another_end_token_is_another_model(tmp_path: Path) -> None:
    """The weights are the same, and prompts without a gold completion too; where answers end is not."""
    before = find_source(str(pilot(tmp_path / "m")))
    file = tmp_path / "m" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"eos_token": settings["pad_token"]}))
    assert find_source(str(tmp_path / "m")).weights != before.weights


def test_the_run_whose_sets_are_measured_says_by_what(tmp_path: Path) -> None:
    """Also where an exported folder with settings of its own is named first."""
    run, export = RunConfig(), RunConfig()
    run.run.name, export.run.name = "run", "export"
    for config in (run, export):
        (tmp_path / config.run.name).mkdir()
        save_config(config, tmp_path / config.run.name / "config.yaml")
    of_export = replace(source("e"), pilot=str(tmp_path / "export" / "pilot"))
    of_run = replace(source("r"), pilot=str(tmp_path / "run" / "pilot" / "final"), run=tmp_path / "run")
    assert _leading_config([of_export, of_run]).run.name == "run"
    assert _leading_config([of_export]).run.name == "export"


def test_what_a_run_s_rows_cannot_have_is_refused(tmp_path: Path) -> None:
    """A run without a log may have no test rows; rows that a run has prepared have their form."""
    of_run = replace(source("r", fused=False), pilot=str(pilot(tmp_path / "pilot")), run=tmp_path)
    (tmp_path / "data").mkdir()

    def write(*rows: dict[str, object]) -> None:
        for part in ("validation", "test"):
            pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), tmp_path / "data" / f"{part}.parquet")

    write()
    with pytest.raises(NotFinishedError, match="r has no test rows of its own: give --data NAME=FILE"):
        _tasks([of_run], RunConfig(), Asked(), tmp_path)
    write({"sample_id": 0, "input_ids": [5, 6], "target_start": 1, "prompt": "p", "answer": "a", "set": "test"})
    with pytest.raises(DataError, match=r"--task: there is no set test; the sets of --data are \(none\)"):
        _tasks([of_run], RunConfig(), Asked(tasks={"test": "obqa"}), tmp_path)
    with pytest.raises(DataError, match="--metric: there is no set other; the sets are test"):
        _tasks([of_run], RunConfig(), Asked(metrics={"other": "nll"}), tmp_path)


@pytest.mark.parametrize("cutoff", [200, 20])
def test_another_model_is_measured_on_the_same_text(cutoff: int) -> None:
    """Also where the completion was too long for the model that read the file."""
    form, tokenizer = DataSection(template="plain", plain_template="{prompt}:", cutoff_tokens=cutoff), make_tokenizer()
    record = {"prompt": "count", "completion": "one two three four five six"}
    row = Encoder(form, tokenizer, 1).rows(Record(1, "line", "", record), held_out=True)[0]
    given = HeldOut(0, row["input_ids"], row["target_start"], "", row["prompt"], row["completion"])
    assert row["was_cut"] == (cutoff == 20)
    other = form.model_copy(update={"plain_template": "Please {prompt}:", "cutoff_tokens": 200})
    (made,) = encoded_for([given], other, tokenizer, False, tokenizer)
    assert made.input_ids[made.target_start :] == given.input_ids[given.target_start :]
