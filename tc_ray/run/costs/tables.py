"""The costs of one or more runs as tables and lines of text: a column for each run. Called by the commands and `page`.

Cells are raw text, as those of `inspection.tables`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tc_ray.inspection.tables import Table
from tc_ray.run.costs.measured import Costs
from tc_ray.text import byte_size
from tc_ray.tracking.statusfile import clock

COMPARED = (
    *("model.pilot", "pilot.method", "pilot.dtype", "pilot.batch_size", "pilot.micro_batch_size", "pilot.zero_stage"),
    *("data.cutoff_tokens", "resources.pilot_workers", "resources.pilot_threads", "resources.pilot_gpus"),
)
"""Settings that a run with a log and one without must share, or their times say nothing about the log."""


class OtherRunError(ValueError):
    """Two runs cannot be compared as asked; the message names both and what differs."""


def tables(runs: Sequence[Costs], against: Costs | None = None) -> list[Table]:
    """All tables. against: a run of the same settings without a log, for the log's cost.

    Raises OtherRunError: `against` has a log, or other settings.
    """
    made = [_run(runs), _time(runs), _sides(runs), _log(runs), _memory(runs)]
    return [*made, _cost(runs, against)] if against is not None else made


def lines(run: Costs) -> list[str]:
    """The costs in a few lines, for the end of a run."""
    largest = sorted(run.parts.items(), key=lambda part: -part[1])[:5]
    parts = ", ".join(f"{name} {clock(seconds)}" for name, seconds in largest if seconds >= 1.0)
    found = [f"time      {clock(run.seconds)}: {parts}"]
    if run.pilot.count:
        found.append(f"speed     {'; '.join(_speeds(run))}")
    if run.copilot.count:
        found.append(f"capacity  {bottleneck(run)}")
    if run.log is not None:
        found.append(f"log       {_log_text(run)}")
    peaks = ", ".join(f"{name} {byte_size(size)}" for name, size in run.memory.items())
    return [*found, *([f"memory    {peaks} at most"] if peaks else []), f"costs     tc-ray report {run.folder}"]


def bottleneck(run: Costs) -> str:
    """Which side sets the pace, and by how much."""
    made, taken = run.produced, run.consumable
    if math.isnan(made) or math.isnan(taken):
        return "unknown: both sides must have been measured"
    both = f"the Pilot makes {made:.3g} rounds/s, the Copilot could take {taken:.3g}"
    if taken >= made:
        return f"{both}: the Pilot sets the pace, the Copilot has {taken / made:.2f} times what is needed"
    behind = f"it falls behind by {made - taken:.2g} rounds/s"
    return f"{both}: the Copilot is the bottleneck, {made / taken:.2f} times too slow; {behind}"


def _speeds(run: Costs) -> list[str]:
    found = [f"Pilot {run.pilot.tokens_per_second:.0f} tokens/s"]
    if run.copilot.count:
        found.append(f"Copilot {run.copilot.tokens_per_second:.0f} target tokens/s")
    return found


def _log_text(run: Costs) -> str:
    log = run.log
    assert log is not None
    each = f", {byte_size(log.bytes / log.rounds)} a round" if log.rounds else ""
    per_token = f", {byte_size(log.bytes / log.tokens)} per token" if log.tokens else ""
    lag = f"; lag {run.lag.y.mean():.1f} rounds on average, {run.lag.y.max():.0f} at most" if len(run.lag.y) else ""
    return f"{byte_size(log.bytes)}{each}{per_token}; the Pilot waited {run.blocked:.1f} s for it{lag}"


def _columns(title: str, runs: Sequence[Costs], rows: Sequence[tuple[str, Callable[[Costs], str]]]) -> Table:
    """A row for each measure that a run has; a column for each run."""
    cells = [[name, *(of(run) for run in runs)] for name, of in rows]
    return Table(title, ("", *(run.run for run in runs)), [row for row in cells if any(row[1:])])


def _run(runs: Sequence[Costs]) -> Table:
    rows: list[tuple[str, Callable[[Costs], str]]] = [
        ("folder", lambda run: str(run.folder)),
        ("state", lambda run: run.state),
        ("starts", lambda run: str(run.starts)),
        ("restarts of workers", lambda run: str(run.restarts)),
        ("Pilot workers, Copilot learners", _processes),
        ("rounds", lambda run: str(run.pilot.count)),
        ("Copilot steps", lambda run: str(run.copilot.count or "")),
    ]
    return _columns("Runs", runs, rows)


def _processes(run: Costs) -> str:
    resources = run.config.resources
    return f"{resources.pilot_workers}, {resources.copilot_workers if run.config.log.enabled else 0}"


def _time(runs: Sequence[Costs]) -> Table:
    names = list(runs[0].parts)
    rows = [(name, _part(name)) for name in names if any(run.parts[name] >= 0.05 for run in runs)]
    title = "Time by part (the Copilot's steps run beside the Pilot's rounds)"
    return _columns(title, runs, [*rows, ("all", lambda run: f"{run.seconds:,.1f} s  100%")])


def _part(name: str) -> Callable[[Costs], str]:
    return lambda run: f"{run.parts[name]:,.1f} s {100 * run.parts[name] / max(run.seconds, 1e-9):4.0f}%"


def _sides(runs: Sequence[Costs]) -> Table:
    rows: list[tuple[str, Callable[[Costs], str]]] = [
        ("Pilot: seconds a round", lambda run: _shown(run.pilot.each)),
        ("Pilot: tokens/s", lambda run: _shown(run.pilot.tokens_per_second)),
        ("Pilot: rounds/s produced", lambda run: _shown(run.produced)),
        ("Pilot: waits for the log, s", lambda run: f"{run.blocked:.1f}" if run.log else ""),
        ("Copilot: seconds a step", lambda run: _shown(run.copilot.each)),
        ("Copilot: target tokens/s", lambda run: _shown(run.copilot.tokens_per_second)),
        ("Copilot: steps per round", lambda run: str(run.config.copilot.steps_per_round) if run.copilot.count else ""),
        ("Copilot: rounds/s consumable", lambda run: _shown(run.consumable)),
        ("Copilot: idle, s", lambda run: f"{run.idle:.1f}" if run.copilot.count else ""),
        ("consumable / produced", lambda run: _shown(run.consumable / run.produced)),
        ("bottleneck", _slower),
        ("lag in rounds: mean", lambda run: f"{run.lag.y.mean():.1f}" if len(run.lag.y) else ""),
        ("lag in rounds: largest", lambda run: f"{run.lag.y.max():.0f}" if len(run.lag.y) else ""),
        ("lag in rounds: last", lambda run: f"{run.lag.y[-1]:.0f}" if len(run.lag.y) else ""),
    ]
    return _columns("Speed and capacity, each measured beside the other", runs, rows)


def _slower(run: Costs) -> str:
    ratio = run.consumable / run.produced
    return "" if math.isnan(ratio) else "the Pilot" if ratio >= 1 else "the Copilot"


def _log(runs: Sequence[Costs]) -> Table:
    rows: list[tuple[str, Callable[[Costs], str]]] = [
        ("bytes", lambda run: byte_size(run.log.bytes) if run.log else "no log"),
        ("rows", lambda run: f"{run.log.rows:,.0f}" if run.log else ""),
        ("files", lambda run: f"{run.log.files:,}" if run.log else ""),
        ("per round", lambda run: byte_size(run.log.bytes / run.log.rounds) if run.log and run.log.rounds else ""),
        ("per token", lambda run: f"{run.log.bytes / run.log.tokens:.0f} B" if run.log and run.log.tokens else ""),
        ("bytes/s of training", lambda run: byte_size(run.log.bytes / run.trained) if run.log and run.trained else ""),
        ("read from", lambda run: run.log.source if run.log else ""),
    ]
    return _columns("Mistake Log", runs, rows)


def _memory(runs: Sequence[Costs]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.memory))
    rows = [(name, _peak(name)) for name in names]
    return _columns("Peak memory by process (data tasks are not measured)", runs, rows)


def _peak(name: str) -> Callable[[Costs], str]:
    return lambda run: byte_size(run.memory[name]) if name in run.memory else ""


def _cost(runs: Sequence[Costs], against: Costs) -> Table:
    """The paper's table 15: the time of fine-tuning with log and Copilot beside it, against fine-tuning alone."""
    for run in runs:
        _check_alike(run, against)

    def more(of: Callable[[Costs], float]) -> Callable[[Costs], str]:
        return lambda run: f"{100 * (of(run) / of(against) - 1):+.1f}%"

    rows: list[tuple[str, Callable[[Costs], str]]] = [
        ("seconds a round, waits included", more(lambda run: (run.pilot.seconds + run.blocked) / run.pilot.count)),
        ("seconds a round, without waits", more(lambda run: run.pilot.each)),
        ("training a round, with checkpoints", more(lambda run: run.trained / run.pilot.count)),
        ("whole run, with evaluation", more(lambda run: run.seconds)),
    ]
    return _columns(
        f"Cost of log and Copilot: time against {against.run} ({against.folder}), without a log", runs, rows
    )


def _check_alike(run: Costs, against: Costs) -> None:
    if against.config.log.enabled:
        raise OtherRunError(f"--against {against.folder}: it has a log; give a run made with log.enabled=false")
    for costs in (run, against):
        if not costs.pilot.count:
            raise OtherRunError(f"{costs.folder} has no round yet: there is nothing to compare")
    differing = [
        f"{name} {_value(run, name)!r} and {_value(against, name)!r}"
        for name in COMPARED
        if _value(run, name) != _value(against, name)
    ]
    if differing:
        raise OtherRunError(f"{run.folder} and {against.folder} cannot be compared: {'; '.join(differing)}")


def _value(run: Costs, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(run.config, section), field)


def _shown(value: float) -> str:
    return "" if not np.isfinite(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
