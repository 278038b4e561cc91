"""Run the cells of a study: as many at once as the cluster holds, in the order of their needs, and show how far they are.

Invariant: a cell with a result is never run again, unless another one needs its models and they are gone. A cell that fails takes
down only those that need it. A cell's task takes no CPU itself, and what its processes will take is counted here: cells that
each hold half of what they need would wait for each other for ever. Called by `cli/study.py`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tc_ray.cluster.capacity import Need
from tc_ray.cluster.failures import short
from tc_ray.cluster.session import cpus_needed, evaluation_need, ray_session, training_needs
from tc_ray.cluster.signals import end_within, resumable
from tc_ray.config.redact import redact_override
from tc_ray.files import DamagedFileError, is_whole
from tc_ray.run.folder import FolderLock
from tc_ray.study.cells import Cell, Cells, placed
from tc_ray.study.file import Study
from tc_ray.study.results import Result, find_result, without_folders
from tc_ray.study.tracking import StudyTracking
from tc_ray.text import visible
from tc_ray.tracking.mlflow_address import tracker_variables
from tc_ray.tracking.statusfile import read_status

SHOW_SECONDS = 30.0
"""Between two lines of progress."""
END_SECONDS = 20.0
"""For cells that were stopped to leave their checkpoints and statuses."""
WEIGHTS = ("pilot", "copilot", "log", "export")
"""Parts of a cell's folder that go where `keep_models` is false."""


class StudyError(RuntimeError):
    """Cells failed; the message names them and says what each ended with."""


def folder_of(study: Study, cell: Cell) -> Path:
    """The folder of a cell."""
    return study.folder / "cells" / cell.folder_name


def results_of(study: Study, cells: Cells) -> dict[str, Result]:
    """Results that are there, by key. Raises DamagedFileError."""
    found = {key: find_result(key, study.result_folders) for key in cells.by_key}
    return {key: result for key, result in found.items() if result is not None}


def left_to_run(study: Study, cells: Cells, results: Mapping[str, Result]) -> list[Cell]:
    """Cells without a result, and those whose models they need and cannot find; each after what it needs."""
    wanted = {key for key in cells.by_key if key not in results}
    for key in list(wanted):
        cell = cells.by_key[key]
        for need in cell.needs if cell.wants_models else ():
            if not _has_models(folder_of(study, cells.by_key[need.key]), need):
                wanted.add(need.key)
    return [cell for key, cell in cells.by_key.items() if key in wanted]


def _has_models(folder: Path, cell: Cell) -> bool:
    parts = ["pilot"] + (["copilot"] if cell.config.log.enabled else [])
    return all(is_whole(folder / part / "final") for part in parts)


def run_study(study: Study, cells: Cells) -> dict[str, Result]:
    """Run what is left; blocks. Returns the results of all cells, by key.

    Raises StudyError: cells failed, after all others have ended. LeaseHeldError: the study is being run already.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(study.folder, f"study {study.file.name}", name="study.lock"), resumable(study.folder):
        results = results_of(study, cells)
        left = left_to_run(study, cells, results)
        if left:
            largest = max((cell.config for cell in left), key=cpus_needed)
            with ray_session(largest), StudyTracking(study, largest) as tracking:
                _Runs(study, cells, results, left, tracking).work()
    return results


class _Runs:
    """The cells at work and those that wait."""

    def __init__(
        self, study: Study, cells: Cells, results: dict[str, Result], left: list[Cell], tracking: StudyTracking
    ) -> None:
        self._study, self._cells, self._results, self._left, self._tracking = study, cells, results, left, tracking
        self._again = {cell.key for cell in left}
        """Not ended yet in this start, also cells that have a result and run for their models."""
        self._running: dict[Any, Cell] = {}
        self._failed: dict[str, str] = {}
        self._shown = 0.0

    def work(self) -> None:
        import ray

        try:
            with resumable(self._study.folder):  # says how to go on first, as the process may be killed within seconds
                while self._left or self._running:
                    self._start_what_fits()
                    ended, _ = ray.wait(list(self._running), timeout=1.0) if self._running else ([], [])
                    for task in ended:
                        self._end(task, self._running.pop(task))
                    self._show()
        except KeyboardInterrupt:
            end_within(END_SECONDS)
            for task in self._running:
                ray.cancel(task)
            if self._running:
                ray.wait(list(self._running), num_returns=len(self._running), timeout=END_SECONDS)
            raise
        if self._failed:
            lines = [f"{name}: {why}" for name, why in self._failed.items()]
            raise StudyError(
                f"{len(lines)} of {len(self._cells.by_key)} cells have no result; the same command tries them again:\n"
                + "\n".join(lines)
            )

    def _start_what_fits(self) -> None:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for cell in list(self._left):
            unmet = [self._cells.by_key[need.key] for need in cell.needs if need.key in self._again]
            blocked = next((need for need in unmet if need.name in self._failed), None)
            if blocked is not None:
                self._left.remove(cell)
                self._failed[cell.name] = f"it needs {blocked.name}"
                continue
            needs = [need for running in self._running.values() for need in _needs(running)]
            if unmet or (self._running and not fit(nodes, [*needs, *_needs(cell)])):
                continue
            self._left.remove(cell)
            self._running[self._submit(cell)] = cell

    def _submit(self, cell: Cell) -> Any:
        import ray

        from tc_ray.study.work import Done, do_cell

        needs = tuple(
            Done(folder_of(self._study, self._cells.by_key[need.key]), self._results[need.key]) for need in cell.needs
        )
        config = placed(cell, folder_of(self._study, cell), self._tracking.uri, self._tracking.run_id)
        # no CPU: see `work`. A process of its own for each cell, so that none leaves anything behind
        task = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(do_cell)
        _print(f"study: {cell.name} starts ({cell.kind})")
        command = " ".join(["tc-ray", *(without_folders(redact_override(word)) for word in sys.argv[1:])])
        return task.remote(cell, config, needs, self._study.result_folders[-1], command, tracker_variables())

    def _end(self, task: Any, cell: Cell) -> None:
        import ray

        try:
            result = ray.get(task)
        except Exception as error:  # noqa: BLE001 - whatever a cell ends with, the others go on
            self._failed[cell.name] = f"{short(error)} ({folder_of(self._study, cell)})"
            _print(f"study: {cell.name} failed: {short(error)}")
            return
        self._results.setdefault(cell.key, result)
        self._again.discard(cell.key)
        self._tracking.result(cell, result)
        values = ", ".join(f"{name} {100 * of.value:.1f}%" for name, of in _values(result))
        _print(f"study: {cell.name} is done: {values}")
        if not self._study.file.keep_models:
            self._remove_models()

    def _remove_models(self) -> None:
        waiting = [self._cells.by_key[key] for key in self._again]  # failed ones too: the same command tries them again
        needed = {need.key for cell in waiting if cell.wants_models for need in cell.needs}
        for key, cell in self._cells.by_key.items():
            if key not in needed | self._again:
                for part in WEIGHTS:
                    shutil.rmtree(folder_of(self._study, cell) / part, ignore_errors=True)

    def _show(self) -> None:
        if time.monotonic() < self._shown + SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        running = "; ".join(
            f"{cell.name}: {_progress(folder_of(self._study, cell))}" for cell in self._running.values()
        )
        _print(f"study: {len(self._results)} of {len(self._cells.by_key)} cells done | {running}")


def _values(result: Result) -> Iterable[tuple[str, Any]]:
    return ((name, answers) for name, model in result.models.items() for answers in model.sets.values())


def _progress(folder: Path) -> str:
    """What the status of a run says; a cell without one is a Copilot from a log, or a measurement."""
    try:
        status = read_status(folder)
    except (OSError, DamagedFileError):
        return "at work"
    done, total = status["pilot"].get("round", 0), status["plan"].get("rounds_total", "?")
    return f"{status['phase']}, round {done}/{total}"


def _needs(cell: Cell) -> list[Need]:
    """What its processes take at once."""
    trains = cell.kind in ("run", "longer", "wider")
    return training_needs(cell.config) if trains else [evaluation_need(cell.config)]


def fit(nodes: Iterable[Mapping[str, float]], needs: Iterable[Need]) -> bool:
    """Whether empty nodes hold all bundles, each on one node: the largest first, each where it fits first."""
    free = [dict(node) for node in nodes]
    bundles: list[dict[str, float]] = []
    for need in needs:
        bundle = dict(need.bundle)
        if gpus := bundle.get("GPU"):  # a fraction is taken from one GPU, which holds a whole number of them
            bundle["GPU"] = 1 / int(1 / gpus + 1e-6)
        bundles += [bundle] * need.count
    for bundle in sorted(bundles, key=lambda b: (b.get("GPU", 0.0), b["CPU"]), reverse=True):
        room = next((node for node in free if all(node.get(k, 0.0) + 1e-6 >= v for k, v in bundle.items())), None)
        if room is None:
            return False
        for name, amount in bundle.items():
            room[name] -= amount
    return True


def _print(line: str) -> None:
    print(visible(line), flush=True)
