"""`ray job submit` of the main job to a cluster of its own, with token authentication on, as a user of a cluster does it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tc_ray.models.hub import default_cache
from tests.support.tiny_model import make_tiny_llama

ROOT = Path(__file__).resolve().parents[3]
BIN = Path(sys.executable).parent
ROWS, HELD_OUT, BATCH = 96, 16, 8
START_SECONDS, STOP_SECONDS, JOB_SECONDS, DEMO_SECONDS = 120, 20, 420, 3000


@dataclass(frozen=True)
class Cluster:
    """A head node on loopback: address of its job API and the environment of an authenticated client."""

    address: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """`ray start --head` in its own session, with its own home, folder, ports and token; nothing else is touched."""
    # a short path: Unix socket names are limited to 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="tcr-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "HOME": str(folder),  # ~/.ray of whoever runs the tests stays as it is
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TC_RAY_CACHE": str(default_cache()),  # the builtin model is converted once a machine
        "OMP_NUM_THREADS": "1",
    }
    gcs, dashboard, client, agent = free_ports(4)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", "--dashboard-host=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder / 'r'}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={200 * 2**20}"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_jobs_api(address, environment, head, folder / "head.log")
        yield Cluster(address, environment)
    finally:
        stop(head, str(token))
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_jobs_api(address: str, environment: dict[str, str], head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while ray_job("list", address, environment).returncode:
        assert head.poll() is None and time.monotonic() < deadline, f"the head did not come up:\n{log.read_text()}"
        time.sleep(1)


def stop(head: subprocess.Popen[bytes], token: str) -> None:
    """End the head's group, then whatever else runs with this cluster's token (job drivers have their own session)."""
    if head.poll() is None:
        os.killpg(head.pid, signal.SIGTERM)
    try:
        head.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(STOP_SECONDS)
    left = [process for process in psutil.process_iter() if token_of(process) == token]
    for process in left:
        process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)


def token_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("RAY_AUTH_TOKEN_PATH")
    except psutil.Error:
        return None


def ray_job(
    what: str, address: str, environment: dict[str, str], *arguments: str, seconds: float = 60
) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "ray"), "job", what, "--address", address, *arguments]
    return subprocess.run(
        command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )


def write_recipe(folder: Path) -> Path:
    recipe = {
        "run": {"name": "submitted", "folder": str(folder / "run")},
        "model": {"pilot": str(make_tiny_llama(folder / "tiny"))},
        "data": {
            "embedded_rows": ROWS + 2 * HELD_OUT,
            "validation_size": HELD_OUT,
            "test_size": HELD_OUT,
            "template": "plain",
            "plain_template": "{prompt}\n",
            "cutoff_tokens": 128,
        },
        "pilot": {"method": "full", "dtype": "fp32", "batch_size": BATCH, "micro_batch_size": BATCH},
        "copilot": {"layers": [1, 3], "dtype": "fp32"},
        "fusion": {"lam_grid": [0.0, 0.5], "max_new_tokens": 8},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_submitted_job_trains_and_exports(cluster: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    without_token = {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    assert ray_job("list", cluster.address, without_token).returncode != 0, "the cluster takes clients without a token"

    entry = ["--", "python", "jobs/train.py", "--config", str(recipe), "pilot.max_rounds=6", "tracking.log_model=false"]
    submitted = ray_job(
        "submit",
        cluster.address,
        cluster.environment,
        "--submission-id",
        "tiny",
        "--working-dir",
        ".",
        *entry,
        seconds=JOB_SECONDS,
    )
    told = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0 and "Job 'tiny' succeeded" in told, told[-4000:]
    status = ray_job("status", cluster.address, cluster.environment, "tiny")
    assert "succeeded" in status.stdout.lower(), status.stdout

    export = tmp_path / "run" / "export"
    assert json.loads((export / "provenance.json").read_text())["rounds"] == 6
    from transformers import AutoModelForCausalLM

    from tc_ray.mistakelog.read.reader import MistakeLog
    from tc_ray.models.fusion import FusedModel

    AutoModelForCausalLM.from_pretrained(export / "pilot")
    FusedModel.from_pretrained(export)
    rounds = MistakeLog(tmp_path / "run" / "log").arrow(columns=["round"])["round"].to_pylist()
    assert sorted(set(rounds)) == [1, 2, 3, 4, 5, 6] and len(rounds) == 6 * BATCH


@pytest.mark.slow
@pytest.mark.timeout(3300)
def test_the_demo_recipe_as_a_job(cluster: Cluster) -> None:
    """The README's command, unchanged: the run folder is kept outside the upload, which Ray deletes."""
    entry = ["--", "python", "jobs/train.py", "--config", "demo"]
    done = ray_job("submit", cluster.address, cluster.environment, "--working-dir", ".", *entry, seconds=DEMO_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "McNemar p = " in done.stdout
    run = Path(cluster.environment["HOME"]) / "tc-ray" / "outputs" / "demo"
    assert f"run folder {run}" in done.stdout
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert (run / "export" / "fusion.json").is_file()
