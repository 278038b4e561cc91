"""Signals that ask a command to end, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMAND = """
import signal, sys, time
from tc_ray.cli.command import run_command
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests started by nohup pass on that it is switched off
def command():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidying up", flush=True)
        time.sleep(float(sys.argv[1]))
        print("tidy", flush=True)
run_command(command)
"""


def started(tidying: float, *, background: bool = False) -> subprocess.Popen[str]:
    """The command, when it waits; background: as a shell without job control starts it, with SIGINT switched off."""
    shell = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"] if background else []
    process = subprocess.Popen(
        [*shell, sys.executable, "-c", COMMAND, str(tidying)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "background"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGHUP, False)],
)
def test_a_signal_ends_a_command_in_order(number: signal.Signals, background: bool) -> None:
    """Fault 11: what is open is closed, one line says why it ended, the exit code is that of the signal."""
    process = started(0.1, background=background)
    process.send_signal(number)
    process.send_signal(number)  # `timeout` and job supervisors send it to the process and to its group
    out, err = process.communicate(timeout=20)
    assert out == "tidying up\ntidy\n"
    assert err == f"tc-ray: stopped by {number.name}\n"
    assert process.returncode == 128 + number


def test_a_second_signal_ends_it_at_once() -> None:
    """Fault 11: whoever asks again does not want to wait."""
    process = started(60)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "tidying up\n"
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.communicate()


def test_a_signal_while_ray_starts_ends_it_too(tmp_path: Path) -> None:
    """Fault 11: Ray's own answer to SIGTERM is an exit with code 15 and no word."""
    code = """
import sys, types
sys.modules["ray"] = types.SimpleNamespace(init=lambda **_: sys.exit(15), is_initialized=lambda: False, shutdown=lambda: None)
from tc_ray.cli.command import run_command
from tc_ray.config.schema import RunConfig
from tc_ray.cluster.session import ray_session
def command():
    with ray_session(RunConfig()):
        pass
run_command(command)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "tc-ray: stopped by SIGTERM\n")


def test_a_signal_before_the_run_begins_says_how_to_go_on(tmp_path: Path) -> None:
    """Fault 11: while Ray starts or waits for a CPU the line said that the run was stopped, and not how to go on."""
    code = """
import sys, types
from pathlib import Path
sys.modules["ray"] = types.SimpleNamespace(init=lambda **_: sys.exit(15), is_initialized=lambda: False, shutdown=lambda: None)
from tc_ray.cli.command import run_command
from tc_ray.config.schema import RunConfig
from tc_ray.run.job import run_job
run_command(lambda: run_job(RunConfig.model_validate({"run": {"folder": sys.argv[1]}})))
"""
    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    line = f"stopped by SIGTERM; the same command resumes from the last checkpoint in {folder}\n"
    assert (done.returncode, done.stderr) == (143, line)


def test_what_hangs_after_a_stop_does_not_change_its_exit_code() -> None:
    """Fault 11: a signal for the whole process group ended Ray too; the run hung a minute in it and ended with code 1."""
    code = """
import os, signal, time
from tc_ray.cli.command import run_command
from tc_ray.cluster.signals import end_within
def command():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        end_within(0.2)
        time.sleep(60)
run_command(command)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False, timeout=30)
    assert done.returncode == 143
