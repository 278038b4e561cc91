"""The command line as a user meets it: exit codes and messages, twice from a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tc_ray.cli.command import message
from tc_ray.config.schema import RunConfig
from tc_ray.mistakelog.table.errors import LogFullError
from tc_ray.tracking.statusfile import NoRunError, note_failure
from tc_ray.tracking.tracker import Tracker
from tests.support.command_line import tc_ray, tc_ray_process

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that really was tracked, still in training."""
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": tmp_path}, "tracking": {"enabled": False}})
    tracker = Tracker(config, tmp_path, {"rounds_total": 20, "copilot_steps_total": 60})
    tracker.phase("train")
    for round in range(1, 6):
        tracker.pilot(round, {"loss": 3.0 - 0.5 * round, "tokens": 100})
        tracker.copilot(round, round, {"loss": 0.9})
    tracker.log({"bytes": 2_500_000, "lag_rounds": 3})
    tracker.event("restart", "worker 1 was restarted")
    tracker.finish("stopped")
    return tmp_path


def test_status_shows_the_run(run_folder: Path) -> None:
    result = tc_ray_process("status", run_folder)
    assert result.returncode == 0, result.stderr
    for text in (
        "trial",
        "5/20",
        "5/60",
        "0.5000",
        "0.9000",
        "3 rounds",
        "2.5 MB",
        "restarts      1",
    ):
        assert text in result.stdout


def test_status_json_is_the_file(run_folder: Path) -> None:
    result = tc_ray("status", run_folder, "--json")
    assert json.loads(result.stdout) == json.loads((run_folder / "status.json").read_text())


def test_follow_ends_with_the_run(run_folder: Path) -> None:
    result = tc_ray("status", run_folder, "--follow")
    assert result.returncode == 0
    assert "[restart] worker 1 was restarted" in result.stdout


def test_status_of_a_killed_run_says_so(run_folder: Path) -> None:
    path = run_folder / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))
    then = time.time() - 600
    os.utime(path, (then, then))
    assert "no sign of life for 10:0" in tc_ray("status", run_folder).stdout


def test_status_of_a_failed_run_says_why(run_folder: Path) -> None:
    """With what went wrong last; a run that was started again and goes on says nothing of it."""
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": run_folder}, "tracking": {"enabled": False}})
    Tracker(config, run_folder).finish("failed", "the Pilot stopped: worker 0: OutOfMemoryError: killed\nsecond line")
    lines = tc_ray("status", run_folder).stdout.splitlines()
    why = lines.index("why           the Pilot stopped: worker 0: OutOfMemoryError: killed")
    assert lines[why - 1 : why + 3] == [
        "state         failed",
        lines[why],
        "              second line",
        "last event    [restart] worker 1 was restarted",
    ]
    assert "why           the Pilot stopped" in tc_ray("status", run_folder, "--follow").stdout
    Tracker(config, run_folder).finish("done")
    assert "why" not in tc_ray("status", run_folder).stdout


def test_a_run_that_failed_before_it_had_a_tracker_says_why(tmp_path: Path) -> None:
    """Bad data, a cluster that is too small. What a Tracker wrote is kept."""
    note_failure(tmp_path, "trial", "train.jsonl, line 3: bad; secret_key=abcdefghij")
    shown = tc_ray("status", tmp_path).stdout
    assert (
        "phase         prepare\nstate         failed\nwhy           train.jsonl, line 3: bad; secret_key=***" in shown
    )
    assert "[failed]" not in tc_ray("status", tmp_path, "--follow").stdout
    note_failure(tmp_path, "trial", "now something else")
    assert "why           now something else" in tc_ray("status", tmp_path).stdout
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": tmp_path}, "tracking": {"enabled": False}})
    Tracker(config, tmp_path).finish("done")
    note_failure(tmp_path, "trial", "a resume that was refused")
    assert "state         done" in tc_ray("status", tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("status", "nowhere"), "nowhere: there is no such folder"),
        (("train", "nowhere.yaml"), "nowhere.yaml"),
        (("train", "demo", "pilot.epoch=2"), "pilot.epochs"),
        (("train", "demo", "pilot.epochs=none", "--plan"), "pilot.epochs"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    result = tc_ray(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("tc-ray: ") and words in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 3


@pytest.mark.parametrize("words", [("status", "X"), ("log", "stats", "X"), ("eval", "X")])
def test_a_wrong_word_is_told_without_its_secret(words: tuple[str, ...]) -> None:
    """A fault found by attack: typer repeated a word that is too many, as it was typed."""
    result = tc_ray(*words, "aws_secret_access_key=SECRET123")
    assert result.returncode == 2
    assert "SECRET123" not in result.stdout + result.stderr


def test_debug_shows_the_traceback() -> None:
    result = tc_ray_process("status", "nowhere", TC_RAY_DEBUG="1")
    assert result.returncode != 0 and "Traceback" in result.stderr


def test_unknown_command_and_help() -> None:
    assert tc_ray("trian").returncode == 2
    result = tc_ray("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "eval", "serve", "status"))


def test_job_script_works_without_installation_and_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", "demo"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [*command, "pilot.zero_stage=7"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert result.returncode == 2
    assert "pilot.zero_stage" in result.stderr and "Traceback" not in result.stderr


def test_error_that_crossed_ray_is_told_as_its_cause() -> None:
    class RemoteError(Exception):
        cause = FileNotFoundError(2, "No such file or directory", "/data/train.jsonl")

    assert message(RemoteError("long remote traceback")) == "No such file or directory: /data/train.jsonl"
    assert message(KeyError("x")) == "KeyError: 'x' (TC_RAY_DEBUG=1 shows the traceback)"


def test_an_error_without_a_file_name_is_a_surprise() -> None:
    """Fault 21: an OSError that names no file was shown as if it spoke for itself, without its type and the way on."""
    hint = "(TC_RAY_DEBUG=1 shows the traceback)"
    assert message(OSError("Generic S3 error: 403")) == f"OSError: Generic S3 error: 403 {hint}"
    assert message(ConnectionResetError(104, "Connection reset by peer")).endswith(f"Connection reset by peer {hint}")
    assert message(PermissionError(13, "Permission denied", "/x")) == "Permission denied: /x"
    # ours name what they are about in their own words
    assert message(NoRunError("x: no run has started in it")) == "x: no run has started in it"
    assert message(LogFullError("no space left at /log")) == "[Errno 28] no space left at /log"


def test_the_shell_completes_commands() -> None:
    words = {"_TC_RAY_COMPLETE": "complete_bash", "COMP_WORDS": "tc-ray tra", "COMP_CWORD": "1"}
    assert tc_ray_process(**words).stdout.split() == ["train", "train-copilot"]
