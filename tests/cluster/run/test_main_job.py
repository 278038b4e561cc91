"""One tiny run of the real job, from data to exported model, and what the job refuses."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch

from tc_ray.cli.command import message
from tc_ray.cli.status import status as show_status
from tc_ray.config.load import load_config
from tc_ray.config.schema import RunConfig
from tc_ray.data.source.records import DataError
from tc_ray.evaluation.sources import NotFinishedError
from tc_ray.export.check import check_tokenizer, weight_bytes
from tc_ray.inspection.source import find_log
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table.lease import LeaseHeldError, RunLease
from tc_ray.mistakelog.table.location import Location
from tc_ray.models.folder import FusionSettings
from tc_ray.models.fusion import FusedModel
from tc_ray.models.identity import ModelSourceError
from tc_ray.pilot.checkpoint import find_checkpoints
from tc_ray.run.evaluate import Asked, evaluate_models
from tc_ray.run.job import JobError, JobResult, run_job
from tc_ray.run.state import check_resume
from tc_ray.serving.deploy.settings import find_export
from tc_ray.tracking.points import read_points
from tc_ray.tracking.statusfile import read_status
from tc_ray.tracking.tracker import Tracker
from tests.support.local_ray import local_ray
from tests.support.tiny_run import assert_log_is_exact, tiny_config
from tests.support.torn_files import torn, torn_forms

ROUNDS = 10
STEPS = 2 * ROUNDS

cluster = local_ray(cpus=2)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("job")
    return tiny_config(folder, tracking__enabled=True, tracking__uri=f"sqlite:///{folder}/mlflow.db")


def test_everything_is_there(config: RunConfig, result: JobResult) -> None:
    run = config.run.path
    for name in (
        "config.yaml",
        "status.json",
        "metrics.jsonl",
        "losses.png",
        "evaluation/report.json",
        "evaluation/report.md",
        "evaluation/report.csv",
        "evaluation/choice.json",
        "evaluation/rows/run/test.jsonl",
        "evaluation/rows/run--pilot/test.jsonl",
        "data/train.parquet",
        "data/validation.parquet",
        "data/test.parquet",
        "log/_delta_log",
        "pilot/checkpoints/round-000010/complete.json",
        "copilot/checkpoints/step-000020/complete.json",
        "export/fusion.json",
        "export/provenance.json",
        "export/config.yaml",
        "export/pilot/config.json",
        "export/pilot/tokenizer.json",
        "export/copilot/model.safetensors",
    ):
        assert (run / name).exists(), name
    assert load_config(run / "config.yaml", []) == config
    assert result.export == run / "export"
    assert result.mlflow_command and "mlflow.db" in result.mlflow_command
    status = read_status(run)
    assert (status["state"], status["phase"], status["restarts"]) == ("done", "done", 0)
    assert status["pilot"]["round"] == ROUNDS
    assert status["copilot"]["step"] == STEPS
    assert not list(run.glob("**/*.tmp"))


def test_log_is_whole_and_reads_with_plain_ray(config: RunConfig, result: JobResult) -> None:
    train = json.loads((config.run.path / "data" / "data.json").read_text())["rows"]["train"]
    assert_log_is_exact(config, ROUNDS, train)
    rows = ray.data.read_delta(str(config.run.path / "log")).take_all()
    assert len(rows) == ROUNDS * config.pilot.batch_size
    row = rows[0]
    targets = len(row["input_ids"]) - row["target_start"]
    assert len(row["error_values"]) == targets * (config.log.top_k + 1)
    assert len(row["rationale"]) == (len(row["input_ids"]) - 1) * 32 * 2


def test_both_models_learned(config: RunConfig, result: JobResult) -> None:
    """Not only ran: the Pilot's loss falls, and the Copilot does better than predicting no error."""
    points = list(read_points(config.run.path / "metrics.jsonl"))
    pilot = [p for p in points if p["kind"] == "pilot"]
    copilot = [p for p in points if p["kind"] == "copilot"]
    assert [p["round"] for p in pilot] == list(range(1, ROUNDS + 1))
    assert [p["step"] for p in copilot] == list(range(1, STEPS + 1))
    assert pilot[-1]["metrics"]["loss"] < pilot[0]["metrics"]["loss"] - 0.1
    assert copilot[-1]["metrics"]["loss"] < 0.97 * copilot[-1]["metrics"]["error_size"]


def test_exported_models_load(config: RunConfig, result: JobResult) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert result.export is not None and result.report is not None
    pilot = AutoModelForCausalLM.from_pretrained(result.export / "pilot", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(result.export / "pilot")
    fused = FusedModel.from_pretrained(result.export)
    assert fused.default_lam == result.report.first.exported_lam
    before = AutoModelForCausalLM.from_pretrained(config.model.pilot, dtype=torch.float32)
    assert not torch.equal(pilot.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    ids = tokenizer("12 + 34 =", return_tensors="pt")["input_ids"]
    plain = pilot.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(fused.generate(ids, max_new_tokens=6, do_sample=False, lam=0.0), plain)


def test_report_says_what_was_measured(config: RunConfig, result: JobResult) -> None:
    assert result.report is not None
    saved = json.loads((config.run.path / "evaluation" / "report.json").read_text())
    for model in ("run/pilot", "run"):
        assert saved["results"][model]["test"]["rows"] == config.fusion.max_test_rows
    grid = saved["sources"]["run"]["grid"]
    assert [row["lam"] for row in grid] == [0.0, 0.5]
    # lambda 0 is the Pilot: its error ratio is 1 by definition
    assert grid[0]["error_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert str(result.report.first) in (config.run.path / "evaluation" / "report.md").read_text()
    points = [p for p in read_points(config.run.path / "metrics.jsonl") if p["kind"] == "evaluation"]
    assert points[-1]["metrics"]["results.run/pilot.test.value"] == saved["results"]["run/pilot"]["test"]["value"]


def test_a_second_run_on_the_folder_is_refused(config: RunConfig, result: JobResult) -> None:
    before = read_status(config.run.path)
    held = RunLease.take(Location(config.log_location), "run first")
    with (
        held,
        pytest.raises(LeaseHeldError, match=rf"in use: run first, process {os.getpid()} on host .*, started \d{{4}}-"),
    ):
        run_job(config)
    assert read_status(config.run.path) == before, "the refused run touched the folder"


def test_finished_run_is_not_trained_again(config: RunConfig, result: JobResult) -> None:
    run = config.run.path
    files = MistakeLog(run / "log").files
    weights = (run / "pilot" / "final" / "model.safetensors").stat().st_mtime_ns
    steps = sum(p["kind"] in ("pilot", "copilot") for p in read_points(run / "metrics.jsonl"))
    # fault 7: what only shows, or can be made anew, stops no start, however it is torn
    for name, form in (
        ("status.json", b'{"run": "tiny", "sta'),
        ("mlflow.json", b"null"),
        ("metrics.jsonl", (run / "metrics.jsonl").read_bytes() + b"\0" * 100 + b"\n"),
        ("data/data.json", b""),
        ("data/quarantine.jsonl", b"\0" * 10),
        ("evaluation/report.json", b"[]"),
        ("evaluation/choice.json", b"[]"),
        ("losses.png", b""),
        ("run.lock", b"\0" * 50),
    ):
        (run / name).write_bytes(form)
    started = time.monotonic()
    # what does not touch the training may be changed
    again = run_job(config.model_copy(update={"fusion": config.fusion.model_copy(update={"max_test_rows": 4})}))
    assert time.monotonic() - started < 60
    assert [line.rows for line in again.report.measured] == [4, 4]
    assert MistakeLog(run / "log").files == files
    assert (run / "pilot" / "final" / "model.safetensors").stat().st_mtime_ns == weights
    assert sum(p["kind"] in ("pilot", "copilot") for p in read_points(run / "metrics.jsonl")) == steps
    status = read_status(run)
    assert status["state"] == "done"
    told = [event["text"] for event in status["events"] if event["kind"] == "tracking"]
    assert any("metrics.jsonl: 1 damaged lines" in text for text in told), told


def test_torn_files_of_a_finished_run(config: RunConfig, result: JobResult) -> None:
    """Fault 7: each small file of the run folder, torn in every way, at everything that reads it: all goes well, or the file is
    named in one line."""
    run = config.run.path
    quiet = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})

    def serve() -> None:
        export = find_export(run)
        FusionSettings.read(export)
        check_tokenizer(export)
        weight_bytes(export)

    def track() -> None:
        Tracker(quiet, run)._ended.set()

    readers: list[Callable[[], object]] = [
        lambda: show_status(run),
        lambda: check_resume(config, run),
        lambda: find_checkpoints(run / "pilot" / "checkpoints"),
        lambda: find_log(str(run)).open(),
        lambda: find_export(run),
        track,
    ]
    small = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size < 100_000]
    small = [path for path in small if not {"log", "ray_train"} & set(path.relative_to(run).parts)]
    assert len(small) > 30
    for path in small:
        for name, form in torn_forms(path.read_bytes(), cuts=1).items():
            for read in [serve] if "export" in path.parts else readers:
                with torn(path, form):
                    try:
                        read()
                    except Exception as error:  # noqa: BLE001 - any is looked at
                        text = message(error)
                        assert "TC_RAY_DEBUG" not in text and "\n" not in text, (path.name, name, text)
                        assert path.name in text or str(path.parent) in text or name == "object", (
                            path.name,
                            name,
                            text,
                        )


def test_changed_training_is_refused(config: RunConfig, result: JobResult) -> None:
    changed = config.model_copy(update={"pilot": config.pilot.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(JobError, match=r"pilot\.learning_rate: 0\.001 -> 0\.5.*Use another run\.folder"):
        run_job(changed)
    assert load_config(config.run.path / "config.yaml", []).pilot.learning_rate == 1e-3, "the refused config was saved"


def test_bad_data_is_named_and_can_be_put_right(tmp_path: Path) -> None:
    """Nothing was trained when the data was refused, so the corrected config may use the same folder."""
    good = [{"prompt": f"{i}+1", "completion": f"{i + 1}"} for i in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*good, {"prompt": "3+4"}, {"prompt": 5}]))
    config = tiny_config(tmp_path, data__train=str(tmp_path / "absent.jsonl"), pilot__max_rounds=1)
    with pytest.raises(DataError, match=r"data\.train: no \.json.*absent\.jsonl"):
        run_job(config)
    config.data.train = str(file)
    with pytest.raises(DataError, match=r"2 of 62 rows are bad(?s:.*)rows\.jsonl, line 61"):
        run_job(config)
    config.data.max_bad_fraction = 0.1
    config.pilot.micro_batch_size = config.pilot.batch_size = 50
    with pytest.raises(DataError, match=r"training rows cannot fill a round of pilot\.batch_size 50"):
        run_job(config)


def test_unknown_model_is_named(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__pilot=str(tmp_path / "no model"))
    with pytest.raises(RuntimeError, match="no model does not exist; give a model folder"):
        run_job(config)


def test_evaluated_again_on_other_data(result: JobResult, tmp_path: Path) -> None:
    """`tc-ray eval RUN --data FILE`: the file's rows are counted, the run's own report stays."""
    own = (result.folder / "evaluation" / "report.json").read_bytes()
    data = tmp_path / "more.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} + 1", "answer": str(n + 1)}) + "\n" for n in range(10, 15)))
    report, folder = evaluate_models([str(result.folder)], Asked({"more": str(data)}))
    assert folder == result.folder / "evaluation-more"
    assert [(line.set, line.rows, line.nll) for line in report.measured] == [("more", 5, None)] * 2
    assert json.loads((folder / "report.json").read_text())["data"] == {"more": str(data)}
    assert (result.folder / "evaluation" / "report.json").read_bytes() == own


def test_a_run_that_has_not_ended_is_not_evaluated(config: RunConfig, result: JobResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "pilot").mkdir(parents=True)
    (run / "config.yaml").write_bytes((result.folder / "config.yaml").read_bytes())
    with pytest.raises(NotFinishedError, match=r"pilot/final/config\.json, copilot/final.*missing"):
        evaluate_models([str(run)], Asked())
    with pytest.raises(ModelSourceError, match=r"has no config\.json"):
        evaluate_models([str(tmp_path)], Asked())
