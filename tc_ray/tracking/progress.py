"""ProgressView: what a run is doing, as a live panel on a terminal and as plain lines elsewhere.

Invariant: it only reads status dicts (`tracker.Tracker.status`, status.json), and asks again if there is none. Their texts are
shown as characters and cannot steer the terminal. `tc-ray train` follows the Tracker with it, `tc-ray status --follow` the
run folder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tc_ray.text import byte_size, visible
from tc_ray.tracking.points import RESTART
from tc_ray.tracking.statusfile import HEARTBEAT_SECONDS, Status

LINE_SECONDS = 10.0
REFRESH_SECONDS = 1.0
EVENTS_IN_PANEL = 4
STALE_SECONDS = 4 * HEARTBEAT_SECONDS
"""A running run whose status is older than this is called dead."""


class ProgressView:
    """Shows status dicts.

    Args:
        console: where to; default standard output. Not a terminal: plain lines.
        line_seconds: least time between two plain lines of one phase.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = LINE_SECONDS) -> None:
        self._console = console or Console()
        self._line_seconds = line_seconds
        self._live: Live | None = None
        self._shown: tuple[str, float] = ("", float("-inf"))
        self._last_event = 0.0

    def show(self, status: Status) -> None:
        """Show one status: redraw the panel, or print a line when one is due and each event once."""
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False)
                self._live.start()
            self._live.update(panel(status), refresh=True)
            return
        for event in status["events"]:
            if event["time"] > self._last_event:
                self._last_event = event["time"]
                self._print(f"[{event['kind']}] {described(event)}")
        key = f"{status['phase']}/{status['state']}/{waiting_text(status.get('waiting', {}))}"
        if key != self._shown[0] or time.monotonic() - self._shown[1] >= self._line_seconds:
            self._shown = (key, time.monotonic())
            self._print(line(status))

    def close(self) -> None:
        """Leave the last panel on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()

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
                    if status["state"] != "running":
                        return
                if stopping:
                    return
                stop.wait(REFRESH_SECONDS)
        finally:
            self.close()

    def _print(self, text: str) -> None:
        self._console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


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

    A reader of the folder adds `silent_seconds` (`statusfile.silent_seconds`); a status from the Tracker itself is never old.
    """
    age_s = status.get("silent_seconds", 0.0)
    if status["state"] != "running" or age_s < STALE_SECONDS:
        return ""
    return f"no sign of life for {clock(age_s)}: it was killed; `tc-ray train` with the same recipe resumes it"


def facts(status: Status) -> dict[str, str]:
    """The numbers to show, as text by name, without those that the run has not got."""
    plan, pilot, copilot = status["plan"], status["pilot"], status["copilot"]
    log, of_pilot = status["log"].get("metrics", {}), pilot.get("metrics", {})
    stored = (
        _text(log.get("bytes"), of=byte_size),
        _text(of_pilot.get("log_bytes_per_token"), "{} per token", byte_size),
    )
    speed = (
        _text(status["tokens_per_second"], "{:.0f} tokens/s"),
        _text(status["rounds_per_minute"], "{:.1f} rounds/min"),
    )
    found = {
        "round": _of(pilot.get("round"), plan.get("rounds_total")),
        "pilot loss": _text(of_pilot.get("loss"), "{:.4f}"),
        "copilot step": _of(copilot.get("step"), plan.get("copilot_steps_total")),
        "copilot loss": _text(copilot.get("metrics", {}).get("loss"), "{:.4f}"),
        "lag": _text(log.get("lag_rounds"), "{:.0f} rounds"),
        "log": ", ".join(filter(None, stored)),
        "speed": ", ".join(filter(None, speed)),
        "restarts": str(status["restarts"] or ""),
        "eta": _text(status["eta_seconds"], of=clock),
    }
    return {name: text for name, text in found.items() if text}


def panel(status: Status) -> RenderableType:
    """The live panel of a status."""
    plan, texts = status["plan"], facts(status)
    bars = Table.grid(padding=(0, 2))
    for label, now, total, loss in (
        ("Pilot", status["pilot"].get("round", 0), plan.get("rounds_total"), texts.pop("pilot loss", "-")),
        ("Copilot", status["copilot"].get("step", 0), plan.get("copilot_steps_total"), texts.pop("copilot loss", "-")),
    ):
        unit = "round" if label == "Pilot" else "step"
        bar = ProgressBar(total=max(total or 1, 1), completed=min(now, total or 1), width=32)
        bars.add_row(Text(label, "bold"), bar, f"{unit} {_of(now, total)}", f"loss {loss}")
    shown = ((name, text) for name, text in texts.items() if name not in ("round", "copilot step"))
    rest = Text("   ").join(Text.assemble((f"{name} ", "dim"), text) for name, text in shown)
    lines: list[RenderableType] = [bars, rest]
    for who, wait in status.get("waiting", {}).items():
        lines.append(Text(visible(f"{who} {wait['text']} ({clock(status['updated'] - wait['since'])})"), "cyan"))
    for event in newest(status["events"], EVENTS_IN_PANEL):
        when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        text = visible(f"{when} {event['kind']}: {described(event)}")
        lines.append(Text(text, "yellow", overflow="ellipsis", no_wrap=True))
    if silence(status):
        lines.append(Text(silence(status), "bold red"))
    colour = {"done": "green", "failed": "red", "stopped": "yellow"}.get(status["state"], "blue")
    title = Text.assemble((visible(status["run"]), "bold"), "  ", (visible(status["phase"]), f"bold {colour}"))
    elapsed = clock(status["updated"] - status["started"])
    return Panel(
        Group(*lines), title=title, title_align="left", subtitle=elapsed, subtitle_align="right", border_style=colour
    )


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    whole = max(0, int(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _of(now: float | None, total: float | None) -> str:
    if now is None:
        return ""
    return f"{now}/{total}" if total else str(now)


def _text(value: float | None, pattern: str = "{}", of: Callable[[float], object] = float) -> str:
    return "" if value is None else pattern.format(of(value))


def newest(events: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The last `limit` events, always with the last restart."""
    chosen = events[-limit:]
    restart = next((event for event in reversed(events) if event["kind"] == RESTART), None)
    return chosen if restart is None or restart in chosen else [restart, *chosen[1:]]


def described(event: dict[str, Any]) -> str:
    """Text of an event with its count."""
    return f"{event['text']} ({event['count']} times)" if event.get("count", 1) > 1 else str(event["text"])
