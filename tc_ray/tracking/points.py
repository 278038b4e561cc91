"""metrics.jsonl: every point a run has measured, one JSON object per line, append only; and losses.png, drawn from it.

Invariant: for one kind and metric the axis (Pilot: round; Copilot: its own step) only grows, over restarts of workers and of
the whole run: a replayed round or step is dropped. MLflow is filled from this file. Damaged lines (a power cut, a full disk)
are skipped and reported; they stop nothing. Written by `tracker.Tracker`, read by `tc-ray status` too.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tc_ray.files import write_file

LOSSES_FILE = "losses.png"
RESTART = "restart"
"""Kind of the events that are counted as restarts."""
EVENTS_SHOWN = 40

Point = dict[str, Any]
"""One line: `kind` ("start", "pilot", "copilot", "validation", "error_ratio", "log", "evaluation", "time", "memory" or "event"), `time`
(unix seconds), `round` (Pilot round known at that time), for "copilot" also `step`, and `metrics` (name -> number or null for NaN) or,
for an event, `event` and `text`. "time": seconds by part of the run. "memory": peak bytes by process. A "start" has `began`: when the
driver began, before the Tracker."""


def read_points(path: Path) -> Iterator[Point]:
    """The points of a metrics.jsonl, none of an absent one. Damaged lines are skipped: see `PointFile.damage`."""
    return (point for _, point in read_lines(path) if point is not None)


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, Point | None]]:
    """Each complete line from byte `start` on: the byte after it, and its point, or None if it holds none.

    A last line without a newline was cut off with its process and is left out.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield start, _parsed(line)


def _parsed(line: bytes) -> Point | None:
    try:
        point = json.loads(line)
        needed = {"event": ("time", "event", "text"), "start": ("time",)}.get(point["kind"], ("time", "metrics"))
        return point if all(name in point for name in needed) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Python, numpy and torch scalars as JSON numbers, None for NaN and infinities."""
    numbers = {name: math.nan if value is None else float(value) for name, value in metrics.items()}
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def numbers_of(prefix: str, tree: Mapping[str, Any]) -> Any:
    """Numeric leaves of a JSON tree as dotted names; lists and texts are left out."""
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from numbers_of(name, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


class PointFile:
    """Append-only writer of metrics.jsonl that drops points which are there already.

    Args:
        path: the file; created with its folder. A cut-off last line is removed.

    started: time of the first point, or None. damage: says how many lines of an earlier start were skipped; empty if none.
    events: the newest EVENTS_SHOWN, alike ones as one with a `count`; restarts are the last to leave. restarts: their number.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.started: float | None = None
        self.events: list[dict[str, Any]] = []
        self.restarts = 0
        self._highest: dict[tuple[str, str], int] = {}
        self._last: dict[str, Point] = {}
        damaged = []
        end = 0
        for number, (end, found) in enumerate(read_lines(path), start=1):  # noqa: B007 - `end` is used after the loop
            if found is None:
                damaged.append(number)
            else:
                self._remember(found)
        text = f"{len(damaged)} damaged lines were skipped, the first is line"
        self.damage = f"{text} {damaged[0]}" if damaged else ""
        self._file = path.open("ab")
        self._file.truncate(end)

    def append(self, kind: str, point: Point, axis: int | None = None) -> None:
        """Write what is new in one point.

        Args:
            point: its keys besides `kind`.
            axis: position on the axis that the metrics of this kind grow along; None: always written.
        """
        point = {"kind": kind, **point}
        if axis is not None:
            metrics = {k: v for k, v in point["metrics"].items() if axis > self._highest.get((kind, k), -1)}
            if not metrics:
                return
            point["metrics"] = metrics
        self._file.write(json.dumps(point, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._remember(point)

    def latest(self, kind: str) -> dict[str, Any]:
        """The newest point of a kind, without its kind and time; empty if there is none."""
        return {name: value for name, value in self._last.get(kind, {}).items() if name not in ("kind", "time")}

    def _remember(self, point: Point) -> None:
        kind = point["kind"]
        if self.started is None:
            self.started = point["time"]
        axis = point.get("step" if kind == "copilot" else "round", 0)
        for name in point.get("metrics", ()):
            self._highest[kind, name] = max(axis, self._highest.get((kind, name), -1))
        self._last[kind] = point
        if kind != "event":
            return
        self.restarts += point["event"] == RESTART
        shown = {"time": point["time"], "kind": point["event"], "text": point["text"], "count": 1}
        for event in self.events:
            if event["kind"] != RESTART and (event["kind"], event["text"]) == (shown["kind"], shown["text"]):
                event["count"] += 1
                return
        self.events.append(shown)
        if len(self.events) > EVENTS_SHOWN:
            del self.events[next((i for i, event in enumerate(self.events) if event["kind"] != RESTART), 0)]


def draw_losses(metrics: Path, picture: Path) -> None:
    """Draw the Pilot's loss by round and the Copilot's by step, each with its running mean. Works while a run goes on."""
    from matplotlib.figure import Figure  # instead of pyplot: no global state, no display needed

    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    points = list(read_points(metrics))
    for axes, (kind, axis, colour) in zip(
        figure.subplots(1, 2), (("pilot", "round", "#1f5fa8"), ("copilot", "step", "#c8541b")), strict=True
    ):
        found = [(p[axis], p["metrics"].get("loss")) for p in points if p["kind"] == kind]
        at = [place for place, loss in found if loss is not None]
        loss = np.array([loss for _, loss in found if loss is not None])
        axes.plot(at, loss, color=colour, alpha=0.3, linewidth=0.8)
        if at:
            window = np.ones(2 * (len(at) // 50) + 1)
            mean = np.convolve(loss, window, "same") / np.convolve(np.ones(len(at)), window, "same")
            axes.plot(at, mean, color=colour, linewidth=1.8)
            axes.set_ylim(bottom=0)
        axes.set_title(f"{kind.capitalize()} loss", loc="left", fontsize=11)
        axes.set_xlabel(axis)
        axes.grid(axis="y", alpha=0.2)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_file(picture, drawn.getvalue())
