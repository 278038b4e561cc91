"""One tiny run by the real command, from data to exported model, with a secret given in every way; and what the job refuses."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import torch
import yaml

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
from tests.support.secret_run import SECRETS, Made, assert_mlflow_has_rows_and_model, make_run, mlflow_server, tc_ray
from tests.support.tiny_run import assert_log_is_exact, tiny_config
from tests.support.torn_files import files_opened, torn, torn_forms

ROUNDS = 10
STEPS = 2 * ROUNDS

cluster = local_ray(cpus=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    mlflow = tmp_path_factory.mktemp("mlflow")
    with mlflow_server(mlflow) as port:
        yield make_run(tmp_path_factory.mktemp("job"), port, mlflow)


@pytest.fixture(scope="module")
def config(made: Made) -> RunConfig:
    return made.config()


@pytest.fixture(scope="module")
def result(config: RunConfig) -> JobResult:
    """Of the same job once more, on the finished run."""
    return run_job(config)


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
        "export/README.md",
        "export/pilot/config.json",
        "export/pilot/tokenizer.json",
        "export/copilot/model.safetensors",
    ):
        assert (run / name).exists(), name
    saved = load_config(run / "config.yaml", [])
    saved.log.storage_options, saved.tracking.uri = config.log.storage_options, config.tracking.uri  # struck out
    assert saved == config
    assert result.export == run / "export"
    assert result.mlflow_command and "http://***@127.0.0.1:" in result.mlflow_command
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


def test_no_file_and_no_line_holds_a_secret(made: Made) -> None:
    """Fault 3: a walk over every byte of the run folder, of MLflow's database and artifacts, and of all output."""
    files = [path for top in (made.run, made.mlflow) for path in top.rglob("*") if path.is_file()]
    names = {str(path.relative_to(made.run)) for path in files if made.run in path.parents}
    assert {"config.yaml", "status.json", "mlflow.json", "export/provenance.json", "metrics.jsonl"} <= names
    assert any("_delta_log" in name for name in names) and any("pilot/checkpoints" in name for name in names)
    assert any(made.mlflow in path.parents and path.name == "provenance.json" for path in files)
    found = [
        f"{secret} in {path}"
        for path in files
        for secret, value in SECRETS.items()
        if value.encode() in path.read_bytes() or value in path.name
    ]
    found += [
        f"{secret} printed by {name}: {text}"
        for name, text in made.said.items()
        for secret, value in SECRETS.items()
        if value in text
    ]
    assert not found, "\n".join(found)


def test_what_is_no_secret_is_kept(made: Made) -> None:
    """The control of the walk above: the places it looked at do hold the harmless part."""
    saved = yaml.safe_load((made.run / "config.yaml").read_text())
    assert saved["log"]["storage_options"] == {
        "azure_storage_sas_key": "***",
        "aws_endpoint_url": "http://***@127.0.0.1:9",
        "aws_region": "us-east-1",
        "aws_secret_access_key": "***",
        "proxy_url": "***",  # it is not in the list of harmless options
    }
    assert saved["tracking"]["uri"].startswith("http://***@127.0.0.1:")
    assert "log.storage_options.aws_secret_access_key=***" in made.command
    assert json.loads(made.said["status"])["mlflow"]["command"].startswith("http://***@127.0.0.1:")


def test_mlflow_has_the_rows_and_the_model_of_the_run(made: Made, result: JobResult) -> None:
    assert_mlflow_has_rows_and_model(made)


def test_a_struck_out_secret_is_not_used_as_if_it_were_one(made: Made) -> None:
    """Fault 3: the saved config as recipe lacks the secrets; they are asked for by name."""
    done = tc_ray("train", made.run / "config.yaml")
    assert done.returncode == 2
    for name in ("tracking.uri", "log.storage_options.aws_secret_access_key", "give the value again"):
        assert name.lower() in done.stderr.lower(), done.stderr


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
    opened = {read: files_opened(read) for read in readers}
    assert sum(path in files for path in small for files in opened.values()) >= 6
    for path in small:
        # a reader cannot stumble over what it does not open; Python knows nothing of files opened by C++ and Rust
        unseen = path.suffix in (".parquet", ".safetensors", ".pt")
        touched = [read for read in readers if unseen or path in opened[read]]
        for name, form in torn_forms(path.read_bytes(), cuts=1).items():
            for read in [serve] if "export" in path.parts else readers if name == "folder" else touched:
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


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def quiet(made: Made) -> RunConfig:
    config = made.config()
    config.tracking.enabled = False
    return config


def test_other_rows_are_refused_and_the_folder_stays(made: Made) -> None:
    """Fault 2: with another text behind a sample id, or the share with the rows gone, the run went on."""
    before, saved = content(made.run / "data"), (made.run / "config.yaml").read_bytes()
    rows = made.rows.read_text()
    try:
        made.rows.write_text(rows.replace('+1"', '+0"'))
        words = r"training rows differ \(data\.train=.*rounds 1 to 10.*another run\.folder"
        with pytest.raises(Exception, match=words):
            run_job(quiet(made))
        made.rows.unlink()
        with pytest.raises(Exception, match=r"training rows differ|data\.train"):
            run_job(quiet(made))
    finally:
        made.rows.write_text(rows)
    assert content(made.run / "data") == before and (made.run / "config.yaml").read_bytes() == saved
    assert not (made.run / "data.new").exists()


def test_other_base_weights_are_refused(made: Made) -> None:
    """Fault 2: adapters and a Copilot would be put on weights that they were not trained over."""
    weights = Path(made.config().model.pilot) / "model.safetensors"
    kept = weights.with_suffix(".kept")
    shutil.copy2(weights, kept)
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 1
    weights.write_bytes(changed)
    try:
        with pytest.raises(Exception, match=r"base weights differ \(model\.pilot=.*rounds 1 to 10"):
            run_job(quiet(made))
    finally:
        os.replace(kept, weights)


def test_a_changed_modification_time_changes_nothing(made: Made) -> None:
    """Fault 2, the other way: the same rows and weights, written again."""
    for file in (made.rows, Path(made.config().model.pilot) / "model.safetensors"):
        file.write_bytes(file.read_bytes())
        os.utime(file)
    before = (made.run / "data" / "train.parquet").read_bytes()
    assert run_job(quiet(made)).report is not None
    assert (made.run / "data" / "train.parquet").read_bytes() == before
