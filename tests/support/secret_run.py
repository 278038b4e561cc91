"""A tiny run by the real command, with a secret given in every way, on MLflow's real server behind a password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tc_ray.config.load import load_config
from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.read.reader import MistakeLog
from tests.support.tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]
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
import os

from flask import Response, request
from mlflow.server import app
from werkzeug.serving import make_server

wanted = os.environ.get("WANTED_AUTHORIZATION")


@app.before_request
def check():
    if wanted and request.headers.get("Authorization") != wanted:
        return Response("who are you?", 401)


server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def mlflow_server(folder: Path, authorization: str = "") -> Iterator[int]:
    """MLflow's own server, with all it keeps in `folder`; yields its port. authorization: header that each request needs.

    A process of its own: the server sets MLflow's tracking address for the whole process that it runs in.
    """
    environment = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "WANTED_AUTHORIZATION": authorization,
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
        yield int(port)
    finally:
        server.kill()
        server.wait()


@dataclass(frozen=True)
class Made:
    """The finished run: its recipe and overrides, what the commands about it printed, and the command in its export."""

    recipe: Path
    overrides: list[str]
    said: dict[str, str]
    command: list[str]
    run: Path
    rows: Path
    mlflow: Path

    def config(self) -> RunConfig:
        return load_config(self.recipe, self.overrides)


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


def make_run(folder: Path, port: int, mlflow: Path, **settings: Any) -> Made:
    """The command in `folder`, its log, and the commands that read it. port, mlflow: of MLflow's server, and its folder."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1", "completion": str(n + 1)}) + "\n" for n in range(80)))
    document = tiny_config(folder, **settings).model_dump(mode="json")
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
    command = json.loads((folder / "run" / "export" / "provenance.json").read_text())["command"]
    return Made(recipe, overrides, said, command, folder / "run", rows, mlflow)


def assert_mlflow_has_rows_and_model(made: Made) -> None:
    """On a server, after two starts: the rows with the log's hash, the model once with its weights."""
    from mlflow import MlflowClient

    config = made.config()
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run = client.get_run(json.loads((made.run / "mlflow.json").read_text())["run_id"])
    rows = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert rows["training"].digest == MistakeLog(config.log_location).metadata.train_rows
    assert str(made.rows) in rows["training"].source
    assert client.get_logged_model(run.outputs.model_outputs[0].model_id).tags["tc_ray.weights"] == "copied"
    assert sorted(file.parent.name for file in made.mlflow.rglob("*.safetensors")) == ["copilot", "pilot"]
