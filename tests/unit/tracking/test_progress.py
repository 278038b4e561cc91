"""ProgressView: plain lines where there is no terminal, a line that changes where there is one, and the end of both."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tc_ray.config.schema import RunConfig
from tc_ray.text import byte_size
from tc_ray.tracking.statusfile import ProgressView, clock
from tc_ray.tracking.tracker import Tracker


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": tmp_path}, "tracking": {"enabled": False}})
    return Tracker(config, tmp_path, {"rounds_total": 10, "copilot_steps_total": 30})


def view(is_terminal: bool = False, **options: Any) -> tuple[ProgressView, io.StringIO]:
    out = io.StringIO()
    return ProgressView(Console(file=out, force_terminal=is_terminal, width=100), **options), out


def test_lines_come_at_phase_changes_and_when_due(tracker: Tracker) -> None:
    shown, out = view()
    for _ in range(5):
        shown.show(tracker.status())
    tracker.phase("train")
    shown.show(tracker.status())
    shown.show(tracker.status())
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["prepare", "train"]
    always, out = view(line_seconds=0.0)
    always.show(tracker.status())
    always.show(tracker.status())
    assert len(out.getvalue().splitlines()) == 2


def test_in_a_notebook_lines_are_printed(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not shown as an HTML block each, which is what rich does where it finds a notebook."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter's kernels do
    shown = ProgressView()
    shown.show(tracker.status())
    shown.show(tracker.status())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["prepare"] and "\x1b" not in lines[0]


def test_an_event_is_printed_once_and_as_it_is(tracker: Tracker) -> None:
    shown, out = view()
    tracker.event("restart", "[red] worker 3")
    for _ in range(3):
        shown.show(tracker.status())
    assert out.getvalue().count("[restart] [red] worker 3") == 1


def test_line_tells_what_there_is(tracker: Tracker) -> None:
    shown, out = view()
    tracker.pilot(1, {"loss": 2.5, "log_bytes_per_token": 1234.5})
    tracker.log({"lag_rounds": 4, "bytes": 56_000})
    shown.show(tracker.status())
    assert "round 1/10 | pilot loss 2.5000 | lag 4 rounds | log 56.0 KB | per token 1.2 KB" in out.getvalue()
    assert "copilot" not in out.getvalue() and "None" not in out.getvalue()


def test_the_error_ratio_stays_with_its_round(tracker: Tracker) -> None:
    shown, out = view(line_seconds=0.0)
    tracker.error_ratio(4, {"held_out": 0.9412, "in_sample": 0.85, "lam": 0.5, "records": 128, "lam_0.5": 0.9412})
    tracker.pilot(9, {"loss": 2.5})
    tracker.copilot(9, 27, {"loss": 0.5})
    shown.show(tracker.status())
    assert "| error ratio 0.941 at lambda 0.5, in-sample 0.850 (round 4)" in out.getvalue()


def test_validations_and_an_early_end(tracker: Tracker) -> None:
    """The plan is that of the rounds which are left; a worker that goes back before the end takes that back."""
    shown, out = view(line_seconds=0.0)
    found = {"nll": 1.25, "lowest": 1.25, "best_round": 2.0, "waited": 0.0, "ended": 0.0}
    tracker.pilot(4, {"loss": 2.5})
    tracker.validation(2, found)
    shown.show(tracker.status())
    assert "| validation NLL 1.2500 (round 2)" in out.getvalue()
    planned = tracker.status()["plan"]
    tracker.validation(4, found | {"nll": 1.5, "waited": 1.0, "ended": 1.0})
    shown.show(tracker.status())
    assert "round 4/4" in out.getvalue() and "| validation NLL 1.5000 (round 4, lowest 1.2500 at 2)" in out.getvalue()
    tracker.validation(4, found | {"nll": None})
    assert tracker.status()["plan"] == planned and planned["rounds_total"] == 10


def test_one_line_changes_on_a_terminal(tracker: Tracker) -> None:
    shown, out = view(is_terminal=True)
    tracker.phase("train")
    shown.show(tracker.status())
    tracker.pilot(3, {"loss": 2.5})
    tracker.event("restart", "worker 3")
    shown.show(tracker.status())
    text = out.getvalue()
    assert all(part in text for part in ("train", "round 3/10", "pilot loss 2.5000", "[restart] worker 3"))
    assert "\x1b[2K" in text, "in place of the line before"


def test_follow_stops_when_told_and_shows_the_last_status(tracker: Tracker) -> None:
    shown, out = view(line_seconds=0.0)
    stop = threading.Event()
    follower = threading.Thread(target=shown.follow, args=(tracker.status, stop))
    follower.start()
    time.sleep(0.2)
    tracker.phase("evaluate")
    stop.set()
    follower.join(5)
    assert not follower.is_alive()
    assert out.getvalue().splitlines()[-1].split()[1] == "evaluate"


def test_follow_ends_with_the_run(tracker: Tracker) -> None:
    tracker.finish("failed")
    shown, out = view()
    shown.follow(tracker.status, threading.Event())
    assert out.getvalue().splitlines()[-1].split()[1] == "failed"


def test_units() -> None:
    assert [clock(s) for s in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]
    assert [byte_size(b) for b in (999, 1500, 2.5e9, 3e12)] == ["999 B", "1.5 KB", "2.5 GB", "3.0 TB"]
