"""status.json, what a run is doing now, as its readers see it: `read_status`, and `ProgressView` that shows it in lines.

Invariant: a reader always sees a whole document. While the run lives the file is never much older than STATUS_SECONDS, so an
old one belongs to a dead run. Texts are shown as characters and cannot steer the terminal. Written by `tracker.Tracker`;
`tc-ray train` follows the Tracker with the view, `tc-ray status --follow` the run folder, without Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tc_ray.config.redact import redact
from tc_ray.files import DamagedFileError, disk_time, read_json, write_json
from tc_ray.text import byte_size, visible

STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
"""Written by a Tracker from its start."""
STATUS_SECONDS = 2.0
"""Between two writes."""
STALE_SECONDS = 60.0
"""A running run whose status is older than this is called dead."""
LINE_SECONDS = 10.0
REFRESH_SECONDS = 1.0
Status = dict[str, Any]
"""Keys: see `tracker.Tracker.status`."""
_NEEDED = {
    "run",
    "state",
    "phase",
    "started",
    "updated",
    "plan",
    "pilot",
    "copilot",
    "error_ratio",
    "log",
    "events",
    "restarts",
}


class NoRunError(FileNotFoundError):
    """The folder holds no run; the message names it and says what is missing."""


def read_status(folder: Path) -> Status:
    """Read the status of a run folder.

    Raises:
        NoRunError: there is no such folder, or no run has started in it. DamagedFileError: status.json holds no status.
    """
    try:
        status = read_json(folder / STATUS_FILE)
    except FileNotFoundError:
        why = "no run has started in it (no status.json)" if folder.is_dir() else "there is no such folder"
        raise NoRunError(f"{folder}: {why}") from None
    if missing := sorted(_NEEDED - set(status)):
        raise DamagedFileError(f"{folder / STATUS_FILE} is damaged: it lacks {', '.join(missing)}")
    return status


def note_failure(folder: Path, run: str, why: str) -> None:
    """Leave a status for a run that failed before it had a Tracker; one that a Tracker wrote stays. Never raises OSError."""
    if (folder / METRICS_FILE).exists():
        return
    now = time.time()
    status = {"run": run, "folder": str(folder), "state": "failed", "phase": "prepare", "started": now, "updated": now}
    empty: dict[str, Any] = {name: {} for name in ("plan", "waiting", "pilot", "copilot", "error_ratio", "log")}
    with contextlib.suppress(OSError):  # the error itself is what has to be shown
        write_json(
            folder / STATUS_FILE,
            status | empty | {"failure": redact(why), "events": [], "restarts": 0, "mlflow": None},
            indent=1,
        )


def silent_seconds(folder: Path) -> float:
    """Seconds since status.json was written, by the disk's clock, or this host's in a folder that may not be written."""
    try:
        now = disk_time(folder)
    except OSError:
        now = time.time()
    return now - (folder / STATUS_FILE).stat().st_mtime


class ProgressView:
    """Shows status dicts: on a terminal one line that changes in place, elsewhere a line when one is due; each event once.

    Args:
        console: where to; default standard output.
        line_seconds: least time between two plain lines of one phase.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = LINE_SECONDS) -> None:
        self._console = console or _standard_output()
        self._line_seconds = line_seconds
        self._live = Live(console=self._console, auto_refresh=False)
        self._shown: tuple[str, float] = ("", float("-inf"))
        self._last_event = 0.0

    def show(self, status: Status) -> None:
        """Show one status."""
        for event in status["events"]:
            if event["time"] > self._last_event:
                self._last_event = event["time"]
                self._print(f"[{event['kind']}] {event['text']}")
        if self._console.is_terminal:
            self._live.start()
            self._live.update(Text(visible(line(status))), refresh=True)
            return
        key = f"{status['phase']}/{status['state']}/{waiting_text(status.get('waiting', {}))}"
        if key != self._shown[0] or time.monotonic() - self._shown[1] >= self._line_seconds:
            self._shown = (key, time.monotonic())
            self._print(line(status))

    def follow(self, source: Callable[[], Status | None], stop: threading.Event) -> None:
        """Show what `source` returns (None: nothing now) about once a second, until the run has ended or `stop` is set, and
        then once more.
        """
        try:
            while True:
                stopping = stop.is_set()
                status = source()
                if status is not None:
                    self.show(status)
                if stopping or (status is not None and status["state"] != "running"):
                    return
                stop.wait(REFRESH_SECONDS)
        finally:
            self._live.stop()

    def _print(self, text: str) -> None:
        self._console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def _standard_output() -> Console:
    """In a notebook it is plain text: rich would show each line as an HTML block, and FORCE_COLOR is set there."""
    console = Console()
    return Console(force_jupyter=False, force_terminal=False) if console.is_jupyter else console


def line(status: Status) -> str:
    """One plain line: phase, rounds, losses, lag, speed, ETA."""
    waiting = waiting_text(status.get("waiting", {}))
    parts = [f"{clock(status['updated'] - status['started'])} {status['phase']}{': ' if waiting else ''}{waiting}"]
    parts += [f"{name} {value}" for name, value in facts(status).items()]
    return " | ".join(filter(None, [*parts, silence(status)]))


def waiting_text(waiting: Mapping[str, Mapping[str, Any]]) -> str:
    """The status's `waiting` as one line, for instance "pilot loading weights; copilot waiting for room: ..."."""
    return "; ".join(f"{who} {wait['text']}" for who, wait in waiting.items())


def silence(status: Status) -> str:
    """What to say of a run that has not written its status for long; else empty.

    A reader of the folder adds `silent_seconds`; a status from the Tracker itself is never old.
    """
    age_s = status.get("silent_seconds", 0.0)
    if status["state"] != "running" or age_s < STALE_SECONDS:
        return ""
    return (
        f"no sign of life for {clock(age_s)}: its driver was killed (by hand, for want of memory, or with its machine); "
        "`tc-ray train` with the same recipe resumes it"
    )


def failure(status: Status) -> dict[str, str]:
    """Why a run has failed, and the last thing that went wrong in one that failed or was killed, as text by name."""
    why, events = status.get("failure") or "", status["events"]
    found = {"why": why}
    if events and (why or silence(status)) and events[-1]["text"] not in why:
        found["last event"] = f"[{events[-1]['kind']}] {events[-1]['text']}"
    return {name: text for name, text in found.items() if text}


def facts(status: Status) -> dict[str, str]:
    """The numbers to show, as text by name, without those that the run has not got."""
    plan, pilot, copilot = status["plan"], status["pilot"], status["copilot"]
    log, of_pilot = status["log"].get("metrics", {}), pilot.get("metrics", {})
    found = {
        "round": _of(pilot.get("round"), plan.get("rounds_total")),
        "pilot loss": _text(of_pilot.get("loss"), "{:.4f}"),
        "validation NLL": _validation(status.get("validation", {})),
        "copilot step": _of(copilot.get("step"), plan.get("copilot_steps_total")),
        "copilot loss": _text(copilot.get("metrics", {}).get("loss"), "{:.4f}"),
        "error ratio": _error_ratio(status["error_ratio"]),
        "lag": _text(log.get("lag_rounds"), "{:.0f} rounds"),
        "log": _text(log.get("bytes"), of=byte_size),
        "per token": _text(of_pilot.get("log_bytes_per_token"), of=byte_size),
        "tokens/s": _text(status.get("tokens_per_second"), "{:.0f}"),
        "rounds/min": _text(status.get("rounds_per_minute"), "{:.1f}"),
        "restarts": str(status["restarts"] or ""),
        "eta": _text(status.get("eta_seconds"), of=clock),
    }
    return {name: text for name, text in found.items() if text}


def _validation(measured: Mapping[str, Any]) -> str:
    """The newest NLL on validation rows and its round, and the lowest one where that is another."""
    found = measured.get("metrics", {})
    if found.get("nll") is None or found.get("lowest") is None:
        return ""
    best = int(found["best_round"])
    lowest = "" if best == measured["round"] else f", lowest {found['lowest']:.4f} at {best}"
    return f"{found['nll']:.4f} (round {measured['round']}{lowest})"


def _error_ratio(measured: Mapping[str, Any]) -> str:
    """On new records at the best lambda, beside that on the Copilot's own ones, and the round that it was measured in."""
    found = measured.get("metrics", {})
    if any(found.get(name) is None for name in ("held_out", "in_sample", "lam")):
        return ""
    at = f"at lambda {found['lam']:g}, in-sample {found['in_sample']:.3f} (round {measured['round']})"
    return f"{found['held_out']:.3f} {at}"


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, whole = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}" if minutes >= 60 else f"{minutes}:{whole:02}"


def _of(now: float | None, total: float | None) -> str:
    if now is None:
        return ""
    return f"{now}/{total}" if total else str(now)


def _text(value: float | None, pattern: str = "{}", of: Callable[[float], object] = float) -> str:
    return "" if value is None else pattern.format(of(value))
