"""cluster/serve.yaml deployed on a real Serve, as `serve deploy` does it, then deployed again with another Copilot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from safetensors.torch import load_file, save_file

from tc_ray.export.check import copilot_version
from tests.support.ports import free_port
from tests.support.serving_cluster import local_ray, replica_pids, soon
from tests.support.serving_samples import make_export

ROOT = Path(__file__).resolve().parents[3]
KEY = {"Authorization": "Bearer k"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def document_for(export: Path, port: int) -> dict[str, Any]:
    """The file of the repository with the folders, port and sizes of this machine."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    [application] = document["applications"]
    application["args"].update(runs=[f"mawps={export}"], threads=1, cache_bytes=2 * 10**8, max_replicas=1)
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    return document


def deploy(document: dict[str, Any]) -> None:
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document))


def version(port: int) -> str:
    answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=KEY, timeout=60)
    return str(answer.json()["data"][0]["copilot"]["version"]) if answer.status_code == 200 else ""


def test_config_file_serves_and_a_changed_user_config_loads_a_newer_copilot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TC_RAY_API_KEY", "k")
    export = make_export(tmp_path / "run", positions=256)
    port = free_port()
    document = document_for(export, port)
    with local_ray():
        serve.start(proxy_location="HeadOnly", http_options=document["http_options"])
        deploy(document)
        assert soon(lambda: version(port) == copilot_version(export), 200)
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=30).status_code == 401
        body = {"model": "mawps", "prompt": "Tom has", "max_tokens": 4, "stream": True}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=KEY, timeout=60)
        assert answer.text.endswith("data: [DONE]\n\n") and answer.headers["x-tc-ray-failover"] == "1"
        before = replica_pids()
        document["applications"][0]["deployments"][0]["user_config"] = {"reload": 1}
        weights, first = export / "copilot/model.safetensors", version(port)
        newer = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
        save_file(newer, weights, metadata={"format": "pt"})
        deploy(document)
        assert soon(lambda: version(port) == copilot_version(export) != first, 60)
        assert replica_pids() == before, "the replica goes on: only its Copilot was replaced"
        serve.shutdown()
