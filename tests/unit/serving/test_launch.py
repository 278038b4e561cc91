"""Start-up refusals: one clear ServingError each, before Ray starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tc_ray.export.check import ExportError, copilot_version
from tc_ray.serving.deploy import launch
from tc_ray.serving.deploy.launch import start_server
from tc_ray.serving.deploy.settings import command_settings, find_export, named_models
from tc_ray.serving.errors import ServingError
from tests.support.command_line import tc_ray, tc_ray_process
from tests.support.ports import free_port
from tests.support.serving_samples import make_export


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return make_export(tmp_path / "my-run", positions=64)


@pytest.fixture(autouse=True)
def _no_key_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TC_RAY_API_KEY", raising=False)

    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("tc_ray.serving.deploy.launch._connect", started)


def start(*arguments: Path | str) -> None:
    """As `tc-ray serve` with these arguments."""
    start_server(command_settings(list(map(str, arguments))))


def test_run_folder_or_export_folder(export: Path) -> None:
    assert find_export(export) == find_export(export.parent) == export


def test_several_models_by_name(export: Path) -> None:
    assert named_models([export, f"other={export.parent}"]) == {"my-run": export, "other": export}
    with pytest.raises(ServingError, match="two models are called 'my-run'"):
        named_models([export, export.parent])
    with pytest.raises(ServingError, match="needs a name"):
        named_models([f"={export}"])
    with pytest.raises(ServingError, match="no run folder"):
        named_models([])


def test_folder_with_an_equals_sign(tmp_path: Path) -> None:
    export = make_export(tmp_path / "lr=0.1", positions=64)
    assert named_models([export.parent]) == {"lr=0.1": export}


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="is no folder"):
        start(tmp_path / "absent")
    with pytest.raises(ExportError, match="holds no exported model"):
        start(tmp_path)


@pytest.mark.parametrize(
    "part", ["fusion.json", "copilot/config.json", "pilot/model.safetensors", "pilot/tokenizer_config.json"]
)
def test_incomplete_folder(export: Path, part: str) -> None:
    (export / part).unlink()
    with pytest.raises(ExportError, match=r"incomplete: .*(fusion|config|safetensors)"):
        start(export.parent)


def test_damaged_fusion_file(export: Path) -> None:
    (export / "fusion.json").write_text("{")
    with pytest.raises(ExportError, match="not valid JSON"):
        start(export)


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_weights_that_are_cut_off(export: Path, kept: float) -> None:
    weights = export / "copilot/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * kept) + 4])
    with pytest.raises(ExportError, match=r"safetensors.*damaged"):
        start(export)


def test_copilot_of_another_pilot(export: Path) -> None:
    change(export / "copilot/config.json", pilot_hidden_size=7)
    with pytest.raises(ExportError, match="made for a Pilot of width 7; this Pilot has 32"):
        start(export)


def test_copilot_of_another_tokenizer(export: Path) -> None:
    change(export / "copilot/config.json", tokenizer="0123456789abcdef")
    with pytest.raises(ExportError, match=r"trained with another tokenizer \(0123456789abcdef\)"):
        start(export)


def test_port_taken(export: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServingError, match=f"port {taken.getsockname()[1]}: Address already in use"):
            start(export, f"serving.port={taken.getsockname()[1]}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.5", "example.org"])
def test_open_host_needs_a_key(export: Path, host: str) -> None:
    with pytest.raises(ServingError, match="no API key is set"):
        start(export, f"serving.host={host}")


def test_open_host_may_be_allowed_by_name(export: Path) -> None:
    with pytest.raises(AssertionError, match="Ray was started"):
        open_host = ("serving.host=0.0.0.0", "serving.allow_open=true", "serving.cache_bytes=1000000")
        start(export, *open_host, f"serving.port={free_port()}")


def test_version_follows_the_content(export: Path) -> None:
    version = copilot_version(export)
    fusion = export / "fusion.json"
    content = fusion.read_text()
    fusion.write_text(content)
    assert copilot_version(export) == version
    fusion.write_text(content.replace("0.5", "0.6"))
    assert copilot_version(export) != version


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "is no folder"),
        (["EXPORT", "serving.max_tokens=0"], "serving.max_tokens is 0: it should be greater than 0"),
        (["EXPORT", "serving.max_token=5"], "unknown key serving.max_token; did you mean serving.max_tokens"),
        (["EXPORT", "serving.replicas=2", "serving.max_replicas=1"], "max_replicas 1 is less than replicas 2"),
        (["EXPORT", "serving.drain_s=5"], "drain_s 5 is shorter than request_timeout_s 600"),
        (["EXPORT", "serving.port=1"], "override serving.port replaces an earlier one"),
        (["EXPORT", "--host", "0.0.0.0"], "no API key is set"),
        (["EXPORT", "serving.key_file=absent"], "key file absent cannot be read"),
        (["EXPORT", "--config", "absent.yaml"], "config file absent.yaml cannot be read"),
        (["EXPORT", "EXPORT"], "two models are called"),
    ],
)
def test_command_ends_with_one_line_and_exit_code_2(export: Path, arguments: list[str], words: str) -> None:
    given = [str(export) if argument == "EXPORT" else argument for argument in arguments]
    assert_refused(words, "--port", str(free_port()), *given)


def test_command_whose_port_is_taken(export: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(f"cannot listen on 127.0.0.1 port {port}: ", "--port", str(port), str(export))


def test_command_with_a_copilot_of_another_tokenizer(export: Path) -> None:
    # found only after transformers is loaded, which must not say a word of its own
    change(export / "copilot/config.json", tokenizer="0123456789abcdef")
    words = "the Copilot was trained with another tokenizer (0123456789abcdef)"
    caches = ("serving.cache_bytes=1", "serving.prefix_bytes=1")
    assert_refused(words, "--port", str(free_port()), *caches, str(export), command=tc_ray_process)


def assert_refused(
    words: str, *arguments: str, command: Callable[..., subprocess.CompletedProcess[str]] = tc_ray
) -> None:
    """`tc-ray serve` says these words in one line on stderr, nothing on stdout, and ends with exit code 2."""
    result = command("serve", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("tc-ray: ") and words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_checks_do_not_load_ray() -> None:
    code = "import sys, tc_ray.serving.deploy.launch as _; sys.exit(any(m in sys.modules for m in ('ray', 'torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def change(config: Path, **fields: object) -> None:
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def test_the_failover_proxy_is_where_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Ray resolves the name."""
    from ray.serve._private.http_util import validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    monkeypatch.setattr("tc_ray.serving.failover.proxy.prepare_process", lambda: prepared.append(True))
    prepared: list[bool] = []
    made = call_function_from_import_path(launch.FAILOVER_PROXY)
    assert [one.cls.__name__ for one in validate_http_proxy_callback_return(made)] == ["FailoverProxy"]
    assert prepared == [True], "or its event loop stands still for long"


def test_a_serve_that_does_not_start_ends_in_one_line(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 4 of a busy machine: the proxy was not ready in time, three times over. Serve itself cannot be made that slow."""
    import ray
    from ray import serve

    def absent(*_: object, **__: object) -> None:
        raise ValueError("no such actor")

    def slow(*_: object, **__: object) -> None:
        raise ray.exceptions.GetTimeoutError("the proxy is not ready\nafter 3 tries")

    ended: list[str] = []
    monkeypatch.setattr(launch, "_connect", lambda *_: False)
    monkeypatch.setattr(ray, "get_actor", absent)
    monkeypatch.setattr(serve, "start", slow)
    monkeypatch.setattr(serve, "shutdown", lambda: ended.append("serve"))
    with pytest.raises(ServingError) as found:
        start(export, f"serving.port={free_port()}")
    assert str(found.value) == "the server did not start: the proxy is not ready"
    assert ended == ["serve"]
