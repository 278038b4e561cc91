"""The last phases of a run: measure Pilot and fused model on held-out rows, then export what was measured.

Invariant: both are repeated by every start, since they are made from the two `final` folders alone. Called by `run.job`.
"""

from __future__ import annotations

import numpy as np

from tc_ray.mistakelog.table.location import Location
from tc_ray.run.state import Run

ERROR_SIZE_ROUNDS = 16
"""Rounds at the end of the log whose mean squared error is compared with that of held-out data."""


def evaluate(run: Run) -> None:
    """Leaves `run.report`, evaluation.json and evaluation.md."""
    from tc_ray.run.evaluate import launch_evaluation

    size, source = logged_error_size(run.log), run.prepared.data.source
    report = launch_evaluation(run.config, source, run.tracker, seen_error_size=size, no_copilot=run.no_copilot)
    report.save(run.folder)
    run.tracker.evaluation.remote(report.to_dict(), report.markdown())
    run.report = report


def export(run: Run) -> None:
    """Leaves `export/`: both models (the Pilot alone if the Copilot failed) and how to join them."""
    from tc_ray.export.write import export_fused

    assert run.report is not None
    run.export = export_fused(run.config, run.report, rounds=run.prepared.rounds)
    if run.config.tracking.log_model:
        run.tracker.artifact.remote(run.export, "export")


def logged_error_size(log: Location) -> float | None:
    """Mean squared error per target token (sum over V of l^2) in the last rounds of the log; None if it has no such token."""
    from tc_ray.mistakelog.read.reader import MistakeLog

    with MistakeLog(log) as mistakes:
        last = max((file.round_max for file in mistakes.files), default=1)
        rounds = (max(1, last - ERROR_SIZE_ROUNDS + 1), last)
        table = mistakes.arrow(rounds, columns=["error_values", "error_rest"])
    errors = table["error_values"].combine_chunks().flatten().to_numpy()
    tokens = len(table["error_rest"].combine_chunks().flatten())
    errors = errors[np.isfinite(errors)]  # rows of another writer may hold others
    return float(np.square(errors, dtype=np.float64).sum() / tokens) if tokens else None
