"""metrics.jsonl: every point a run has measured, one JSON object per line, append only.

Invariant: for one kind and metric the axis (Pilot: round; Copilot: its own step) only grows, over restarts of workers and of
the whole run: a replayed round or step is dropped. MLflow is filled from this file. Damaged lines (a power cut, a full disk)
are skipped and reported; they stop nothing. Written by `tracker.Tracker`, read by `plot.draw_losses` and `tc-ray status`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

METRICS_FILE = "metrics.jsonl"
RESTART = "restart"
"""Kind of the events that are counted as restarts."""
log = logging.getLogger(__name__)

Point = dict[str, Any]
"""One line: `kind` ("start", "pilot", "copilot", "log", "evaluation" or "event"), `time` (unix seconds), `round` (Pilot
round known at that time), for "copilot" also `step`, and `metrics` (name -> number or null for NaN) or, for an event,
`event` and `text`."""


class _Line(BaseModel):
    """What readers rely on in a line."""

    model_config = ConfigDict(strict=True)
    kind: str
    time: FiniteFloat
    round: int = 0
    step: int = 0
    metrics: dict[str, FiniteFloat | None] = {}
    event: str = ""
    text: str = ""


def read_points(path: Path) -> Iterator[Point]:
    """The points of a metrics.jsonl, none of an absent one. Damaged lines are skipped; a warning at the end counts them."""
    damaged = []
    for number, (_, point) in enumerate(read_lines(path), start=1):
        if point is None:
            damaged.append(number)
        else:
            yield point
    if damaged:
        log.warning("%s: %s", path, _skipped(damaged))


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
        _Line.model_validate(point)
    except (ValueError, RecursionError, ValidationError):
        return None
    known = {"event": ("event", "text"), "start": ()}.get(point["kind"], ("metrics",))
    return point if all(name in point for name in known) else None


def _skipped(damaged: list[int]) -> str:
    return f"{len(damaged)} damaged lines were skipped, the first is line {damaged[0]}"


class PointFile:
    """Append-only writer of metrics.jsonl that drops points which are there already.

    Args:
        path: the file; created with its folder. A cut-off last line is removed.

    damage: says how many lines of an earlier start were skipped; empty if none. restarts: events of that kind in the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._highest: dict[tuple[str, str], int] = {}
        self.restarts = 0
        self._last: dict[str, Point] = {}
        damaged = []
        end = 0
        for number, (end, found) in enumerate(read_lines(path), start=1):  # noqa: B007 - `end` is used after the loop
            if found is None:
                damaged.append(number)
            else:
                self._remember(found)
        self.damage = _skipped(damaged) if damaged else ""
        self.is_resumed = bool(self._last)
        self._file = path.open("ab")
        self._file.truncate(end)

    def append(self, kind: str, point: Point, axis: int | None = None) -> Point | None:
        """Write one point. Returns it as written, or None if nothing in it is new.

        Args:
            point: its keys besides `kind`; `metrics` are made plain numbers.
            axis: position on the axis that the metrics of this kind grow along; None: always written.
        """
        point = {"kind": kind, **point}
        if "metrics" in point:
            metrics = plain_numbers(point["metrics"])
            if axis is not None:
                metrics = {k: v for k, v in metrics.items() if axis > self._highest.get((kind, k), -1)}
                if not metrics:
                    return None
            point["metrics"] = metrics
        self._file.write(json.dumps(point, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._remember(point)
        return point

    def latest(self, kind: str) -> dict[str, Any]:
        """`round`, `step` and `metrics` of the newest point of a kind, as far as it has them."""
        point = self._last.get(kind, {})
        return {name: point[name] for name in ("round", "step", "metrics") if name in point}

    def close(self) -> None:
        """Close the file; `append` fails after it."""
        self._file.close()

    def _remember(self, point: Point) -> None:
        kind = point["kind"]
        axis = point.get("step" if kind == "copilot" else "round", 0)
        for name in point.get("metrics", ()):
            key = (kind, name)
            self._highest[key] = max(axis, self._highest.get(key, -1))
        self.restarts += kind == "event" and point["event"] == RESTART
        self._last[kind] = point


def plain_numbers(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Python, numpy and torch scalars as JSON numbers, None for NaN and infinities. TypeError names what is no number."""
    plain: dict[str, float | None] = {}
    for name, value in metrics.items():
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metric {name!r} is not a number: {value!r}") from None
        plain[name] = number if math.isfinite(number) else None
    return plain
