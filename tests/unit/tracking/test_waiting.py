"""What a run waits for, in the progress line and the status; and the status of a run that is stopped."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tc_ray.cli.status import status
from tc_ray.config.schema import RunConfig
from tc_ray.tracking.statusfile import ProgressView, read_status
from tc_ray.tracking.tracker import Tracker

LOADING = "loading weights of 7 GB"


def tracker_of(folder: Path, **tracking: Any) -> Tracker:
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": folder}, "tracking": tracking})
    return Tracker(config, folder)


def shown(tracker: Tracker, is_terminal: bool = False) -> str:
    out = io.StringIO()
    view = ProgressView(Console(file=out, force_terminal=is_terminal, width=120))
    view.show(tracker.status())
    return out.getvalue()


def test_what_is_waited_for_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 22: the line said "train" while a worker got ready for minutes."""
    tracker = tracker_of(tmp_path, enabled=False)
    tracker.phase("train")
    tracker.waiting("copilot", "loading weights")
    tracker.waiting("pilot", LOADING)
    assert f"train: copilot loading weights; pilot {LOADING}" in shown(tracker)
    assert LOADING in shown(tracker, is_terminal=True)
    waiting = read_status(tmp_path)["waiting"]
    assert waiting["pilot"]["text"] == LOADING and waiting["pilot"]["since"] > 0
    status(tmp_path)
    assert f"waiting       copilot loading weights; pilot {LOADING}" in capsys.readouterr().out
    tracker.waiting("copilot", "")
    tracker.waiting("pilot", "")
    assert read_status(tmp_path)["waiting"] == {}
    assert " train | " in shown(tracker)


def test_a_line_is_printed_when_what_is_waited_for_changes(tmp_path: Path) -> None:
    """Fault 22: not ten seconds later."""
    tracker, out = tracker_of(tmp_path, enabled=False), io.StringIO()
    view = ProgressView(Console(file=out, width=120), line_seconds=1000.0)
    for text in ("loading weights", "loading weights", LOADING, ""):
        tracker.waiting("pilot", text)
        view.show(tracker.status())
    assert [line.partition(": ")[2] for line in out.getvalue().splitlines()] == [
        "pilot loading weights",
        f"pilot {LOADING}",
        "",
    ]


def test_a_stopped_run_has_its_status_before_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 11: `ray job stop` kills three seconds after SIGTERM."""
    seen = []
    monkeypatch.setattr("tc_ray.tracking.tracker.draw_losses", lambda *_: seen.append(read_status(tmp_path)["state"]))
    tracker = tracker_of(tmp_path, enabled=False)
    tracker.waiting("pilot", LOADING)
    ended = tracker.finish("stopped")
    assert seen == ["stopped"]
    assert (ended["state"], ended["waiting"]) == ("stopped", {})
