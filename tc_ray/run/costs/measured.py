"""What the files of a run folder say about its costs: `read_costs` of metrics.jsonl, status.json, config.yaml and the log.

Invariant: times by part add up to the time of the run, over all of its starts; what no process reported is "rest". A part that a
killed process was at work on is in the rest. Called by `tc-ray report` and at the end of `tc-ray train`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tc_ray.config.load import load_saved_config
from tc_ray.config.schema import RunConfig
from tc_ray.inspection.source import LogNotFoundError, find_log
from tc_ray.tracking.points import Point, read_points
from tc_ray.tracking.statusfile import METRICS_FILE, read_status

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Side:
    """The rounds of the Pilot, or the steps of the Copilot, that were measured.

    count: of them. seconds: that they took, without waits for the log's queue. tokens: of the Pilot all, of the Copilot target tokens.
    """

    count: int
    seconds: float
    tokens: float

    @property
    def each(self) -> float:
        """Mean seconds of one; NaN without any."""
        return self.seconds / self.count if self.count else math.nan

    @property
    def tokens_per_second(self) -> float:
        """While it worked; NaN without any."""
        return self.tokens / self.seconds if self.seconds else math.nan


@dataclass(frozen=True)
class LogSize:
    """Of the Mistake Log: what its table holds, or what the run's last status said where the table is in an object store.

    tokens: of the Pilot's rounds that the files cover. source: what the numbers were read from.
    """

    bytes: float
    rows: float
    files: int
    rounds: int
    tokens: float
    source: str


@dataclass(frozen=True)
class Curve:
    """A line of a picture: x and y [N] float64."""

    x: Floats
    y: Floats


@dataclass(frozen=True)
class Costs:
    """What a run took so far. Times in seconds, sizes in bytes."""

    run: str
    folder: Path
    state: str
    config: RunConfig
    starts: int
    restarts: int
    seconds: float
    """From the begin of each start to its last sign of life."""
    parts: Mapping[str, float]
    """Adds up to `seconds`, in the order of a run."""
    pilot: Side
    copilot: Side
    between_rounds: float
    """The Pilot's seconds at checkpoints and validations."""
    blocked: float
    """The Pilot's seconds at the full queue of the log."""
    idle: float
    """The Copilot's seconds between its first and last step that were not steps."""
    memory: Mapping[str, float]
    """Peak by process."""
    log: LogSize | None
    lag: Curve
    """Rounds that the Pilot is ahead of the Copilot, over seconds of the run."""
    pilot_loss: Curve
    copilot_loss: Curve

    @property
    def produced(self) -> float:
        """Rounds a second that the Pilot makes, checkpoints and validations included; NaN without any."""
        return self.pilot.count / (self.pilot.seconds + self.between_rounds) if self.pilot.seconds else math.nan

    @property
    def consumable(self) -> float:
        """Rounds a second that the Copilot could take: 1 / (steps per round x seconds a step); NaN without any."""
        return 1.0 / (self.config.copilot.steps_per_round * self.copilot.each)

    @property
    def trained(self) -> float:
        """Seconds of the Pilot's training: rounds, waits, checkpoints and validations."""
        return self.pilot.seconds + self.blocked + self.between_rounds


def read_costs(folder: Path) -> Costs:
    """The costs of the run in `folder`, which may be running, done or dead.

    Raises NoRunError, DamagedFileError, ConfigError: no run there, or a file of it cannot be read.
    """
    status, config = read_status(folder), load_saved_config(folder / "config.yaml")
    points = list(read_points(folder / METRICS_FILE))
    spans = _spans(points, float(status["updated"]))
    pilot, copilot = (_of_kind(points, kind) for kind in ("pilot", "copilot"))
    times = _sums(points, "time")
    blocked = _growth([_number(point, "log_blocked_seconds") for point in pilot])
    rounds = _side(pilot, "round_seconds", minus=blocked)
    seconds = sum(end - began for began, end in spans)
    return Costs(
        run=status["run"],
        folder=folder,
        state=status["state"],
        config=config,
        starts=len(spans),
        restarts=status["restarts"],
        seconds=seconds,
        parts=_parts(times, rounds.seconds, blocked, seconds),
        pilot=rounds,
        copilot=_side(copilot, "step_seconds"),
        between_rounds=times.get("pilot checkpoints", 0.0) + times.get("pilot validation", 0.0),
        blocked=blocked,
        idle=_idle(copilot, spans),
        memory=_peaks(points),
        log=_log_size(folder, config, pilot, points),
        lag=_lag(pilot, copilot, spans),
        pilot_loss=_curve(pilot, "round"),
        copilot_loss=_curve(copilot, "step"),
    )


def _spans(points: Sequence[Point], updated: float) -> list[tuple[float, float]]:
    """Begin and last sign of life of each start, in unix seconds. A Tracker that is restarted begins no new one."""
    spans: list[tuple[float, float]] = []
    for point in points:
        began = float(point["began"] if "began" in point else point["time"])
        if point["kind"] == "start" and (not spans or began > spans[-1][0]):
            spans.append((began, point["time"]))
        elif spans:
            spans[-1] = spans[-1][0], max(spans[-1][1], point["time"])
    if spans:
        spans[-1] = spans[-1][0], max(spans[-1][1], updated)
    return spans


def _parts(times: Mapping[str, float], rounds: float, blocked: float, seconds: float) -> dict[str, float]:
    of_pilot = {
        "Pilot: loading": times.get("pilot load", 0.0),
        "Pilot: rounds": rounds,
        "Pilot: waits for the log": blocked,
        "Pilot: waits for the Copilot": times.get("pilot lockstep", 0.0),
        "Pilot: validation": times.get("pilot validation", 0.0),
        "Pilot: checkpoints": times.get("pilot checkpoints", 0.0),
        "Pilot: export": times.get("pilot export", 0.0),
    }
    starting = times.get("train_pilot", 0.0) - sum(of_pilot.values())
    named = ("prepare", "open_run", "start_copilot")
    parts = {
        "starting Ray": times.get("ray", 0.0),
        "data": times.get("data", 0.0),
        "models, log, tracking": sum(times.get(name, 0.0) for name in named) - times.get("data", 0.0),
        "starting workers, rounds again": starting,
        **of_pilot,
        "Copilot: catch-up": times.get("finish_copilot", 0.0),
        "evaluation": times.get("evaluate", 0.0),
        "export": times.get("export", 0.0),
    }
    parts = {name: max(0.0, value) for name, value in parts.items()}
    return {**parts, "rest": max(0.0, seconds - sum(parts.values()))}


def _of_kind(points: Sequence[Point], kind: str) -> list[Point]:
    return [point for point in points if point["kind"] == kind]


def _number(point: Point, name: str) -> float:
    value = point["metrics"].get(name)
    return math.nan if value is None else float(value)


def _sums(points: Sequence[Point], kind: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for point in _of_kind(points, kind):
        for name, value in point["metrics"].items():
            sums[name] = sums.get(name, 0.0) + (value or 0.0)
    return sums


def _peaks(points: Sequence[Point]) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for point in _of_kind(points, "memory"):
        for name, value in point["metrics"].items():
            peaks[name] = max(peaks.get(name, 0.0), value or 0.0)
    return dict(sorted(peaks.items()))


def _growth(values: Sequence[float]) -> float:
    """By how much a number has grown that begins at 0 again with each attempt of the Pilot."""
    known = [0.0, *(value for value in values if not math.isnan(value))]
    return sum(now - before if now >= before else now for before, now in pairwise(known))


def _side(points: Sequence[Point], seconds: str, minus: float = 0.0) -> Side:
    measured = [point for point in points if not math.isnan(_number(point, seconds))]
    spent = sum(_number(point, seconds) for point in measured)
    tokens = sum(_number(point, "tokens") for point in measured)
    return Side(len(measured), max(0.0, spent - minus), tokens)


def _idle(copilot: Sequence[Point], spans: Sequence[tuple[float, float]]) -> float:
    idle = 0.0
    for began, end in spans:
        own = [point for point in copilot if began <= point["time"] <= end]
        if own:
            busy = sum(_number(point, "step_seconds") for point in own[1:])
            idle += max(0.0, own[-1]["time"] - own[0]["time"] - busy)
    return idle


def _curve(points: Sequence[Point], axis: str) -> Curve:
    found = [(point[axis], _number(point, "loss")) for point in points]
    line = np.array([one for one in found if not math.isnan(one[1])], np.float64).reshape(-1, 2)
    return Curve(line[:, 0], line[:, 1])


def _lag(pilot: Sequence[Point], copilot: Sequence[Point], spans: Sequence[tuple[float, float]]) -> Curve:
    """At each round of the Pilot and each step of the Copilot; the time between two starts does not count."""
    sides = {"pilot": pilot, "copilot": copilot}
    events = sorted((point["time"], who, point["round"]) for who, points in sides.items() for point in points)
    at, lag, done = [], [], {"pilot": 0, "copilot": 0}
    for time, who, round in events if copilot else ():
        done[who] = max(done[who], round)
        at.append(sum(max(0.0, min(time, end) - began) for began, end in spans))
        lag.append(max(0, done["pilot"] - done["copilot"]))
    return Curve(np.array(at, np.float64), np.array(lag, np.float64))


def _log_size(folder: Path, config: RunConfig, pilot: Sequence[Point], points: Sequence[Point]) -> LogSize | None:
    """None: the run has no log, or none yet."""
    if not config.log.enabled:
        return None
    try:
        place = find_log(str(folder))
    except LogNotFoundError:
        return None
    tokens = {point["round"]: _number(point, "tokens") for point in pilot}
    if "://" in place.uri:  # the caller's credentials for it are not known here
        said = _of_kind(points, "log")
        if not said:
            return None
        size, rounds, number = said[-1]["metrics"], int(said[-1]["metrics"]["round"]), said[-1]["metrics"]["version"]
        covered, source = sum(tokens.get(round, 0.0) for round in range(1, rounds + 1)), "the run's last report of it"
        return LogSize(
            size["bytes"], size["rows"], int(size["files"]), rounds, covered, f"{source}, version {number:g}"
        )
    with closing(place.open()) as log:
        held = {round for file in log.files for round in range(file.round_min, file.round_max + 1)}
        return LogSize(
            float(sum(file.bytes for file in log.files)),
            float(sum(file.rows for file in log.files)),
            len(log.files),
            len(held),
            sum(tokens.get(round, 0.0) for round in held),
            f"table version {log.version}",
        )
