"""One tiny run with a secret given in every way; then resumes of it with other data and other weights.

The run is the real command in a process of its own, with MLflow's real server behind an address that holds a password.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import yaml

from tc_ray.config.load import load_config
from tc_ray.config.schema import RunConfig
from tc_ray.run.job import run_job
from tests.support.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[3]
SECRETS = {
    "option on the command line": "Tr0ub4dor-optn",
    "option in the recipe": "Tr0ub4dor-rcpe",
    "endpoint's userinfo": "Tr0ub4dor-endp",
    "proxy's userinfo": "Tr0ub4dor-prxy",
    "tracking address": "Tr0ub4dor-mlfl",
    "environment": "Tr0ub4dor-envi",
    "proxy in the environment": "Tr0ub4dor-envp",
    "refused": "Tr0ub4dor-rfsd",
}


MLFLOW_SERVER = """
from mlflow.server import app
from werkzeug.serving import make_server

server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """MLflow's own server; yields its port and the folder with all it keeps.

    A process of its own: the server sets MLflow's tracking address for the whole process that it runs in.
    """
    folder = tmp_path_factory.mktemp("mlflow")
    environment = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", MLFLOW_SERVER],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert server.stdout is not None
        port = server.stdout.readline()
        assert port, (folder / "server.log").read_text()
        yield int(port), folder
    finally:
        server.kill()
        server.wait()


@dataclass(frozen=True)
class Made:
    """The finished run: its recipe and overrides, and what the commands about it printed."""

    recipe: Path
    overrides: list[str]
    said: dict[str, str]
    run: Path
    rows: Path
    mlflow: Path

    def config(self) -> RunConfig:
        config = load_config(self.recipe, self.overrides)
        config.tracking.enabled = False
        return config


def tc_ray(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PYTHONPATH": str(ROOT),
        "AWS_SESSION_TOKEN": SECRETS["environment"],
        "HTTPS_PROXY": f"http://user:{SECRETS['proxy in the environment']}@127.0.0.1:9",
    }
    command = [sys.executable, "-m", "tc_ray.cli.main", *map(str, words)]
    return subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, mlflow_server: tuple[int, Path]) -> Made:
    port, mlflow = mlflow_server
    folder = tmp_path_factory.mktemp("job")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1", "completion": str(n + 1)}) + "\n" for n in range(80)))
    document = tiny_config(folder, pilot__max_rounds=4, pilot__checkpoint_every_rounds=2).model_dump(mode="json")
    document["data"] |= {"train": str(rows), "fallback": "embedded"}
    document["tracking"]["enabled"] = True
    document["log"]["storage_options"] = {
        "azure_storage_sas_key": SECRETS["option in the recipe"],
        "aws_endpoint_url": f"http://user:{SECRETS['endpoint' + chr(39) + 's userinfo']}@127.0.0.1:9",
        "aws_region": "us-east-1",
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document))
    overrides = [
        f"log.storage_options.aws_secret_access_key={SECRETS['option on the command line']}",
        f"log.storage_options.proxy_url=http://user:{SECRETS['proxy' + chr(39) + 's userinfo']}@127.0.0.1:9",
        f"tracking.uri=http://user:{SECRETS['tracking address']}@127.0.0.1:{port}",
    ]
    said = {}
    for name, words in {
        "train": ["train", recipe, *overrides],
        "status": ["status", folder / "run", "--json"],
        "stats": ["log", "stats", folder / "run"],
    }.items():
        done = tc_ray(*words)
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        said[name] = done.stdout + done.stderr
    refused = tc_ray("train", recipe, f"log.storage_option.aws_secret_access_key={SECRETS['refused']}")
    assert refused.returncode == 2 and "log.storage_options" in refused.stderr
    said["refused"] = refused.stdout + refused.stderr
    return Made(recipe, overrides, said, folder / "run", rows, mlflow)


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
    command = json.loads((made.run / "export" / "provenance.json").read_text())["command"]
    assert "log.storage_options.aws_secret_access_key=***" in command
    assert json.loads(made.said["status"])["mlflow"]["command"].startswith("http://***@127.0.0.1:")


def test_a_struck_out_secret_is_not_used_as_if_it_were_one(made: Made) -> None:
    """Fault 3: the saved config as recipe lacks the secrets; they are asked for by name."""
    done = tc_ray("train", made.run / "config.yaml")
    assert done.returncode == 2
    for name in ("tracking.uri", "log.storage_options.aws_secret_access_key", "give the value again"):
        assert name.lower() in done.stderr.lower(), done.stderr


@pytest.fixture(scope="module")
def cluster(made: Made) -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_rows_are_refused_and_the_folder_stays(made: Made, cluster: None) -> None:
    """Fault 2: with another text behind a sample id, or the share with the rows gone, the run went on."""
    before, saved = content(made.run / "data"), (made.run / "config.yaml").read_bytes()
    rows = made.rows.read_text()
    try:
        made.rows.write_text(rows.replace('+1"', '+0"'))
        words = r"training rows differ \(data\.train=.*rounds 1 to 4.*another run\.folder"
        with pytest.raises(Exception, match=words):
            run_job(made.config())
        made.rows.unlink()
        with pytest.raises(Exception, match=r"training rows differ|data\.train"):
            run_job(made.config())
    finally:
        made.rows.write_text(rows)
    assert content(made.run / "data") == before and (made.run / "config.yaml").read_bytes() == saved
    assert not (made.run / "data.new").exists()


def test_other_base_weights_are_refused(made: Made, cluster: None) -> None:
    """Fault 2: adapters and a Copilot would be put on weights that they were not trained over."""
    weights = Path(made.config().model.pilot) / "model.safetensors"
    kept = weights.with_suffix(".kept")
    shutil.copy2(weights, kept)
    changed = bytearray(weights.read_bytes())
    changed[-5] ^= 1
    weights.write_bytes(changed)
    try:
        with pytest.raises(Exception, match=r"base weights differ \(model\.pilot=.*rounds 1 to 4"):
            run_job(made.config())
    finally:
        os.replace(kept, weights)


def test_a_changed_modification_time_changes_nothing(made: Made, cluster: None) -> None:
    """Fault 2, the other way: the same rows and weights, written again."""
    for file in (made.rows, Path(made.config().model.pilot) / "model.safetensors"):
        file.write_bytes(file.read_bytes())
        os.utime(file)
    before = (made.run / "data" / "train.parquet").read_bytes()
    assert run_job(made.config()).report is not None
    assert (made.run / "data" / "train.parquet").read_bytes() == before
