"""`tc-ray export --push`: what stops an upload is said before any work; what the hub lists is what was written.

The hub is a local server that speaks the calls that are needed. The library reads its address once, so the commands run in processes
of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tc_ray.export.push import PushError, Repository
from tests.support.command_line import tc_ray_process
from tests.support.hub_server import HubServer, hub_server
from tests.support.pilot_runs import make_pilot_run
from tests.support.ports import free_port

TOKEN = "hf_made-up-for-this-test"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pilot_run(tmp_path_factory.mktemp("push"))


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with hub_server() as server:
        yield server


def export(run: Path, out: Path, *more: str, endpoint: str, token: str = TOKEN) -> tuple[int, str, str]:
    """Exit code and both outputs. No token of this machine is used."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_TOKEN_PATH": str(out.parent / "none"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    done = tc_ray_process("export", run, "--to", "merged", "--out", out, *more, **environment)
    return done.returncode, done.stdout, done.stderr


def test_without_a_token_nothing_is_done(run: Path, tmp_path: Path) -> None:
    code, _, error = export(run, tmp_path / "out", "--push", "me/pilot", endpoint="http://127.0.0.1:9", token="")
    assert code == 2 and "set HF_TOKEN" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_is_one_line(run: Path, tmp_path: Path) -> None:
    code, _, error = export(run, tmp_path / "out", "--push", "me/pilot", endpoint=f"http://127.0.0.1:{free_port()}")
    assert code == 2 and "the hub cannot be used" in error and len(error.splitlines()) == 1
    assert TOKEN not in error
    assert not (tmp_path / "out").exists()


def test_the_folder_is_uploaded_to_a_private_repository(run: Path, tmp_path: Path, hub: HubServer) -> None:
    code, said, error = export(run, tmp_path / "out", "--push", "me/pilot", endpoint=hub.url)
    assert code == 0, error
    assert said.splitlines()[-1] == f"uploaded: {hub.url}/me/pilot"
    assert hub.repositories == {"me/pilot": True}
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "complete.json"}
    assert hub.files["me/pilot"] == written and {"README.md", "model.safetensors"} <= written.keys()
    assert {token for _, path, token in hub.calls if path.startswith(("/api/models", "/api/repos"))} == {
        f"Bearer {TOKEN}"
    }


@pytest.fixture
def used(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The hub of this process."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    return hub


def folder_of(place: Path) -> Path:
    (place / "README.md").write_text("---\nlicense: mit\n---\n")
    (place / "pilot.gguf").write_bytes(b"GGUF" * 100)
    return place


def test_a_public_repository_is_asked_for(tmp_path: Path, used: HubServer) -> None:
    used.repositories["me/pilot"], used.files["me/pilot"] = False, {}
    with pytest.raises(PushError, match="is there and public; add --public"):
        Repository.checked("me/pilot", public=False)
    Repository.checked("me/pilot", public=True).push(folder_of(tmp_path))
    assert used.files["me/pilot"].keys() == {"README.md", "pilot.gguf"}
    Repository.checked("me/other", public=True).push(tmp_path)
    assert used.repositories == {"me/pilot": False, "me/other": False}


def test_a_file_that_the_hub_has_not_is_named(tmp_path: Path, used: HubServer) -> None:
    used.lose.add("pilot.gguf")
    with pytest.raises(PushError, match=r"the hub has not stored pilot\.gguf whole") as caught:
        Repository.checked("me/pilot", public=False).push(folder_of(tmp_path))
    assert f"hf upload me/pilot {tmp_path} . --exclude complete.json --private" in str(caught.value)


def test_an_upload_that_fails_says_what_to_do_with_the_folder(
    tmp_path: Path, used: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command would refuse the folder, which exists by then."""
    repository = Repository.checked("me/pilot", public=True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(PushError, match="the hub cannot be used") as caught:
        repository.push(folder_of(tmp_path))
    assert "or remove it and run the command again" in str(caught.value)
    assert f"`hf upload me/pilot {tmp_path} . --exclude complete.json`" in str(caught.value)


@pytest.mark.parametrize("name", ["pilot", "me/pi lot", "me/you/pilot", "me/--"])
def test_names_that_cannot_be(name: str, used: HubServer) -> None:
    with pytest.raises(PushError, match=f"--push {name}"):
        Repository.checked(name, public=False)
    assert used.calls == []
