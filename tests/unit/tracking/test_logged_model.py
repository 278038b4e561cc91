"""The exported model in MLflow: loaded by a process that has MLflow and tc-ray alone, stored once, registered once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoTokenizer

from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.export.check import ExportError
from tc_ray.export.pyfunc import ExportedModel, _load_pyfunc, describe, export_version
from tc_ray.models.folder import FusionSettings
from tc_ray.models.fusion import FusedModel
from tc_ray.tracking import logged_model
from tc_ray.tracking.logged_model import ModelToLog
from tc_ray.tracking.mlflow_address import resolve_uri
from tc_ray.tracking.mlflow_writer import open_run
from tc_ray.tracking.tracker import Tracker
from tests.support.family_samples import make_copilot, new_pilot
from tests.support.mlflow_store import new_store
from tests.support.tiny_model import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
LAM = 3.0
PROMPTS = ["3+4", "hello there"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a run with an export, in a folder with a store."""
    folder = tmp_path_factory.mktemp("model")
    new_store(folder)
    config = RunConfig.model_validate(
        {
            "run": {"name": "trial", "folder": folder / "trial"},
            "data": {"template": "plain", "plain_template": "{prompt}="},
            "pilot": {"dtype": "fp32"},
            "fusion": {"max_new_tokens": 6},
            "tracking": {"register": "helper"},
        }
    )
    copilot, _ = make_copilot("llama", base="pilot", pilot="pilot")
    export = config.run.path / "export"
    FusedModel.join(new_pilot("llama", "pilot"), copilot, lam=LAM, space="logits", feedback="own").save_pretrained(
        export
    )
    make_tokenizer().save_pretrained(export / "pilot")
    save_config(config, export / "config.yaml")
    return config


def to_log(config: RunConfig) -> ModelToLog:
    described = describe(config.run.path / "export", config)
    return ModelToLog(**described, example=PROMPTS[0], register=config.tracking.register)


def start(config: RunConfig, model: ModelToLog) -> tuple[MlflowClient, str]:
    """A start of the run that logs the model and ends; the client and the MLflow run's id."""
    mlflow = open_run(config, config.run.path)
    tracker = Tracker(config, config.run.path, mlflow=mlflow)
    tracker.model(model)
    assert tracker.finish("done")["mlflow"]["errors"] == 0, (config.run.path / "metrics.jsonl").read_text()
    return MlflowClient(tracking_uri=mlflow.uri), mlflow.run_id


def answers(config: RunConfig, lam: float) -> list[str]:
    """Of the fused model, by transformers' `generate`."""
    export = config.run.path / "export"
    fused, tokenizer = FusedModel.from_pretrained(export), AutoTokenizer.from_pretrained(export / "pilot")
    said = []
    for prompt in PROMPTS:
        ids = tokenizer(f"{prompt}=", return_tensors="pt", add_special_tokens=False).input_ids
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": tokenizer.eos_token_id, "lam": lam}
        out = fused.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return said


FRESH = """
import json, sys
import mlflow, pandas as pd

mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
prompts = pd.DataFrame({"prompt": json.loads(sys.argv[3])})
said = [list(model.predict(prompts, params=params)["completion"]) for params in (None, {"lam": 0.0})]
example = model.input_example["prompt"].tolist()
print(json.dumps({"said": said, "inputs": model.metadata.signature.to_dict()["inputs"], "example": example}))
"""


def test_a_fresh_process_loads_it_from_the_registry_and_gets_the_runs_answers(config: RunConfig) -> None:
    client, run_id = start(config, to_log(config))
    again, _ = start(config, to_log(config))
    (version,) = again.search_model_versions("name='helper'")
    assert (str(version.version), version.run_id) == ("1", run_id), "a run that is started again registers nothing anew"
    (output,) = client.get_run(run_id).outputs.model_outputs
    assert version.source == client.get_logged_model(output.model_id).artifact_location
    command = [sys.executable, "-c", FRESH, resolve_uri(config), "models:/helper/1", json.dumps(PROMPTS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd="/", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["said"] == [answers(config, LAM), answers(config, 0.0)]
    assert told["said"][0] != told["said"][1], "the correction changes something, so the test sees lambda"
    assert json.loads(told["inputs"])[0] == {"type": "string", "name": "prompt", "required": True}
    assert told["example"] == [PROMPTS[0]]


def test_weights_on_the_runs_own_disk_are_links(config: RunConfig) -> None:
    client, run_id = start(config, to_log(config))
    (output,) = client.get_run(run_id).outputs.model_outputs
    assert client.get_logged_model(output.model_id).tags["tc_ray.weights"] == "linked"
    stored = list((config.run.path.parent / "mlartifacts").rglob("*.safetensors"))
    weights = list((config.run.path / "export").rglob("*.safetensors"))
    assert sorted(file.stat().st_ino for file in stored) == sorted(file.stat().st_ino for file in weights)


@pytest.mark.parametrize(("room", "placing"), [(10**9, "copied"), (10, "named")])
def test_elsewhere_they_are_copied_up_to_a_size_and_else_named(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: int, placing: str
) -> None:
    """Another disk: its number is all that decides."""
    monkeypatch.setattr(logged_model, "LARGEST_COPY", room)
    export, other = config.run.path / "export", tmp_path / "store"
    real = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result | SimpleNamespace:
        found = real(path, **options)
        return found if path.is_relative_to(export) else SimpleNamespace(st_dev=-1, st_mode=found.st_mode)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", stat)
        assert logged_model._placing(export, other.as_uri()) == placing
    monkeypatch.setattr(logged_model, "_placing", lambda *_: placing)
    client, run_id = start(config, replace(to_log(config), version=f"another {placing}", register=None))
    logged = [client.get_logged_model(one.model_id) for one in client.get_run(run_id).outputs.model_outputs]
    (found,) = [one for one in logged if one.tags["tc_ray.weights"] == placing]
    folder = Path(found.artifact_location.removeprefix("file://"))
    assert bool(list(folder.rglob("*.safetensors"))) == (placing == "copied")
    if placing == "named":
        with pytest.raises(ExportError, match="another model by now"):
            _load_pyfunc(str(folder))
        named = json.loads((folder / "export.json").read_text())
        (folder / "export.json").write_text(json.dumps(named | {"version": to_log(config).version}))
        model = _load_pyfunc(str(folder))
        assert list(model.predict(pd.DataFrame({"prompt": PROMPTS}))["completion"])
        (folder / "export.json").write_text(json.dumps(named | {"folder": str(tmp_path / "gone")}))
        with pytest.raises(ExportError, match=r"gone, which is not there.*docs/tracking\.md"):
            _load_pyfunc(str(folder))


@pytest.mark.parametrize("changed", [{"space": "probability"}, {"feedback": "realised"}, {"lam": 1.0}, {}])
def test_what_changes_the_answers_is_another_version(
    config: RunConfig, tmp_path: Path, changed: dict[str, Any]
) -> None:
    """A resumed run may have another fusion; {} stands for max_new_tokens."""
    export = tmp_path / "export"
    shutil.copytree(config.run.path / "export", export)
    assert export_version(export) == to_log(config).version
    if changed:
        replace(FusionSettings.read(export), **changed).write(export)
    else:
        other = config.model_copy(update={"fusion": config.fusion.model_copy(update={"max_new_tokens": 7})})
        save_config(other, export / "config.yaml")
    assert export_version(export) != to_log(config).version


def test_a_slow_upload_leaves_the_run_ended_and_is_an_event(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended with its picture before the upload begins; the upload goes on, of an ended run."""
    client, seen, go = MlflowClient(tracking_uri=resolve_uri(config)), [], threading.Event()

    def slow(found: MlflowClient, run_id: str, model: ModelToLog) -> None:
        state = found.get_run(run_id).info.status
        seen.append((state, {artifact.path for artifact in found.list_artifacts(run_id)}))
        go.wait(60)

    monkeypatch.setattr("tc_ray.tracking.tracker.log_model", slow)
    monkeypatch.setattr("tc_ray.tracking.tracker.UPLOAD_SECONDS", 0.5)
    mlflow = open_run(config, config.run.path)
    tracker = Tracker(config, config.run.path, mlflow=mlflow)
    for round in (1, 2):
        tracker.pilot(round, {"loss": 1.0 / round})
    tracker.model(to_log(config))
    time.sleep(1.5)
    assert not seen, "the upload waits for the end"
    status = tracker.finish("done")
    go.set()
    assert client.get_run(mlflow.run_id).info.status == "FINISHED"
    assert seen[0][0] == "FINISHED" and "losses.png" in seen[0][1]
    assert [event["text"] for event in status["events"] if "did not end within" in event["text"]]


def test_a_pilot_alone_answers_too(config: RunConfig, tmp_path: Path) -> None:
    """Of a run whose Copilot failed. Frames keep their index, also an empty one."""
    alone = tmp_path / "export"
    shutil.copytree(config.run.path / "export", alone, ignore=shutil.ignore_patterns("copilot"))
    assert "lam" not in describe(alone, config)["parameters"]
    frame = pd.DataFrame({"prompt": PROMPTS}, index=[7, 3])
    said = ExportedModel(alone, "cpu").predict(frame, {"max_new_tokens": 6})
    assert list(said["completion"]) == answers(config, 0.0) and list(said.index) == [7, 3]
    assert ExportedModel(alone, "cpu").predict(frame[:0]).empty
