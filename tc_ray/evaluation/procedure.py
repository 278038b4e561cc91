"""A whole evaluation: choose lambda of each model on validation rows, measure every set once, compare, report.

Invariant: the test rows decide nothing but the report. The choice of a run is kept in its folder with a hash of all that
decides it; a later evaluation takes it from there. Called by `run.evaluate`, with Ray running.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tc_ray
from tc_ray.config.fusion import FusionSection
from tc_ray.config.named import source_hash
from tc_ray.config.section import is_named
from tc_ray.evaluation.choose import Chosen, Passes, choose_lambda, grid_of, results_of
from tc_ray.evaluation.compare import Line, line_of, pairs_of
from tc_ray.evaluation.pool import Pool
from tc_ray.evaluation.report import Report, examples_of
from tc_ray.evaluation.rows import RowResult, RowSet, results_file, rows_hash, write_results
from tc_ray.evaluation.scores import check_gold
from tc_ray.evaluation.sources import ModelSource
from tc_ray.files import DamagedFileError, finite, read_json, typed, write_json

CHOICE_FILE = "choice.json"


@dataclass(frozen=True)
class Task:
    """A model, and rows as its tokenizer and prompt form have them. validation: to choose lambda on; None: it has a choice.
    kept: folder that its choice is kept in; None: nowhere. fusion: of its own run, by which it is chosen; None: as it is measured."""

    source: ModelSource
    sets: Sequence[RowSet]
    validation: RowSet | None = None
    kept: Path | None = None
    fusion: FusionSection | None = None


class NoValidationError(ValueError):
    """There is nothing to choose lambda on; the message says what to do."""


def evaluate(
    tasks: Sequence[Task],
    fusion: FusionSection,
    pool: Pool,
    out: Path,
    *,
    choose_again: bool = False,
    labels: Sequence[str] = (),
    exports: bool = False,
) -> Report:
    """Measure all models on all sets; leaves rows/ in `out`. The sets of all tasks are the same rows in the same order.

    Args:
        choose_again: choose lambda even where a choice is known. labels: items to rank, for the metric ranking.
        exports: an export of the one model follows, of which the report speaks.

    Raises NoGoldError: rows lack what their metric needs. NoValidationError. EvaluationError: see `Pool`.
    """
    for rows in (*tasks[0].sets, *(task.validation for task in tasks if task.validation is not None)):
        check_gold(rows, set(labels))
    results: dict[str, dict[str, list[RowResult]]] = {}
    lines: list[Line] = []
    chosen: dict[str, Chosen] = {}
    for task in tasks:
        settings, own = task.source.settings, task.fusion or fusion
        feedback = own.feedback if settings is None else settings.feedback
        passes = Passes(pool, task.source, own, feedback, tuple(labels))
        choice = chosen[task.source.name] = _choice(task, passes, choose_again)
        passes = replace(passes, fusion=fusion)
        pilot = (grid_of(fusion)[0][0], 0.0)
        asked = list(dict.fromkeys([pilot, choice.choice if choice.lam else pilot]))
        for rows in task.sets:
            forced, said = passes.forced(rows, asked), passes.said(rows, asked)
            of_pilot = results_of(rows, forced, 0, said, 0)
            for model, number in zip(task.source.models, (0, len(asked) - 1), strict=False):
                found = results_of(rows, forced, number, said, number) if number else of_pilot
                results.setdefault(model, {})[rows.name] = found
                write_results(results_file(out, model, rows.name), found)
                lines.append(line_of(model, rows, found, of_pilot, asked[number], fusion.ranking.cutoffs))
    sets = tasks[0].sets
    report = Report(
        measured=lines,
        pairs=pairs_of(results, sets),
        sources={task.source.name: task.source for task in tasks},
        chosen=chosen,
        data={rows.name: rows.source for rows in sets},
        examples=examples_of(sets[0], *(results[model][sets[0].name] for model in tasks[0].source.models)),
        exports=exports,
    )
    _forget_others(out, pool)
    return report


def _choice(task: Task, passes: Passes, again: bool) -> Chosen:
    source, fusion = task.source, passes.fusion
    space = grid_of(fusion)[0][0]
    if source.copilot is None:
        return Chosen(space, 0.0, passes.feedback, source.no_copilot or "")
    settings, validation = source.settings, task.validation
    if settings is not None and not again:
        return Chosen(settings.space, settings.lam, settings.feedback, "as exported")
    if validation is None or not validation.rows:
        raise NoValidationError(
            f"{source.name}: no validation rows, so lambda cannot be chosen. A run has them (data.validation or "
            "data.validation_size); an exported folder takes those of the first run that is named"
        )
    key = _choice_key(source, validation, passes)
    kept = None if task.kept is None else task.kept / CHOICE_FILE
    if kept is not None and not again and (found := _kept_choice(kept, key)) is not None:
        return found
    chosen = choose_lambda(passes, validation)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"key": key, "chosen": finite(asdict(chosen))})
    return chosen


def _choice_key(source: ModelSource, validation: RowSet, passes: Passes) -> str:
    fusion = passes.fusion
    decides: list[Any] = [
        tc_ray.__version__,
        source.weights,
        source.dtype,
        rows_hash(validation.rows),
        validation.metric,
    ]
    decides += [validation.option_by, grid_of(fusion), passes.feedback, fusion.max_new_tokens, fusion.num_beams]
    decides += [fusion.ranking.cutoffs, passes.labels]
    if is_named(validation.metric):
        decides.append(source_hash(validation.metric, f"metric of {validation.name}"))
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]


def _kept_choice(file: Path, key: str) -> Chosen | None:
    """The choice that was kept; None if it is of something else, or cannot be read."""
    try:
        document = read_json(file)
        return typed(document["chosen"], Chosen, file) if document["key"] == key else None
    except (OSError, DamagedFileError, KeyError):
        return None


def _forget_others(out: Path, pool: Pool) -> None:
    """Remove the parts of passes that this evaluation did not use: they are of other settings."""
    parts = out / PARTS
    for folder in parts.iterdir() if parts.is_dir() else ():
        if folder.name not in pool.keys:
            shutil.rmtree(folder, ignore_errors=True)


PARTS = "parts"
