"""Start-up refusals: one clear ServingError each, before Ray starts."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest

from tc_ray.serving.auth import configured_digest, digest, is_loopback
from tc_ray.serving.errors import ServingError
from tc_ray.serving.launch import find_export, model_name, start_server
from tests.serving_samples import make_export


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path / "my-run", positions=64)


@pytest.fixture(autouse=True)
def _no_key_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TC_RAY_API_KEY", raising=False)

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("tc_ray.serving.launch._connect", started)


def test_run_folder_or_export_folder(export: Path) -> None:
    assert find_export(export) == find_export(export.parent) == export
    assert model_name(export) == "my-run"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="is no folder"):
        start_server(tmp_path / "absent")
    with pytest.raises(ServingError, match="holds no exported model"):
        start_server(tmp_path)


@pytest.mark.parametrize(
    "part", ["fusion.json", "copilot/config.json", "pilot/model.safetensors", "pilot/tokenizer_config.json"]
)
def test_incomplete_folder(export: Path, part: str) -> None:
    (export / part).unlink()
    with pytest.raises(ServingError, match=r"incomplete: .*(fusion|config|safetensors)"):
        start_server(export.parent)


def test_damaged_fusion_file(export: Path) -> None:
    (export / "fusion.json").write_text("{")
    with pytest.raises(ServingError, match="not valid JSON"):
        start_server(export)


def test_copilot_of_another_pilot(export: Path) -> None:
    config = export / "copilot/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pilot_hidden_size": 7}))
    with pytest.raises(ServingError, match="made for a Pilot of width 7; this Pilot has 32"):
        start_server(export)


def test_encoder_decoder_is_refused(export: Path) -> None:
    config = export / "pilot/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "is_encoder_decoder": True}))
    with pytest.raises(ServingError, match="encoder-decoder; the server answers with decoder-only"):
        start_server(export)


def test_port_taken(export: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServingError, match=f"port {taken.getsockname()[1]}: Address already in use"):
            start_server(export, port=taken.getsockname()[1])


@pytest.mark.parametrize("port", [0, 70_000])
def test_no_port(export: Path, port: int) -> None:
    with pytest.raises(ServingError, match="not between"):
        start_server(export, port=port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.5", "example.org"])
def test_open_host_needs_a_key(export: Path, host: str) -> None:
    with pytest.raises(ServingError, match="no API key is set"):
        start_server(export, host)


def test_loopback_hosts() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"))


def test_key_from_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configured_digest() is None
    monkeypatch.setenv("TC_RAY_API_KEY", "from-env")
    assert configured_digest() == digest("from-env")
    (tmp_path / "key").write_text("from-file\n")
    assert configured_digest(tmp_path / "key") == digest("from-file")
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ServingError, match="empty"):
        configured_digest(tmp_path / "key")
    with pytest.raises(ServingError, match="cannot be read"):
        configured_digest(tmp_path / "absent")
    monkeypatch.setenv("TC_RAY_API_KEY", " ")
    with pytest.raises(ServingError, match="set but empty"):
        configured_digest()


def test_checks_do_not_load_ray() -> None:
    import subprocess

    code = "import sys, tc_ray.serving.launch as _; sys.exit(any(m in sys.modules for m in ('ray', 'torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
