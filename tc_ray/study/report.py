"""The report of a study: Markdown, one HTML page and CSV from the same tables.

Invariant: no number is made by hand. A table of the paper is reproduced in its shape: variants down, tasks across. Called by
`cli/study.py`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tc_ray.config.redact import redact_override
from tc_ray.evaluation.scores import KNOWS_RIGHT
from tc_ray.files import write_file
from tc_ray.inspection.report import render
from tc_ray.inspection.tables import Table
from tc_ray.study.cells import Cells
from tc_ray.study.charts import Picture, Point, compute_chart, correction_chart
from tc_ray.study.file import CONTROLS, PILOT, Study
from tc_ray.study.numbers import Mean, Numbers, Shown, Tested, mean_of
from tc_ray.study.results import Result, without_folders

_COLUMNS = (
    *("line", "task", "seed", "set", "metric", "rows", "left_out", "value", "nll", "lam", "space", "temperature"),
    *("error_ratio", "correction", "compute", "pilot_seconds", "copilot_seconds", "rounds", "pilot_parameters"),
    *("copilot_parameters", "kind", "key"),
)


@dataclass(frozen=True)
class Part:
    """A section of the report: what to know, then tables and pictures."""

    title: str
    text: str
    tables: list[Table]
    pictures: list[Picture]


class Report:
    """The report of what is there. results: of the cells, by key; a missing one is named."""

    def __init__(self, study: Study, cells: Cells, results: Mapping[str, Result]) -> None:
        self.study, self.numbers = study, Numbers(study, cells, results)
        self.results = list(results.values())
        self.base = study.first + PILOT
        self.parts = [
            self._scores(),
            *map(self._against, study.against),
            self._nll(),
            self._costs(),
            self._corrections(),
        ]

    def facts(self) -> list[tuple[str, str]]:
        """(name, value) of what was run, where and how."""
        file, numbers = self.study.file, self.numbers
        rows = []
        for task in numbers.tasks:
            shown = next((s for line in numbers.lines for s in numbers.at(line, task).values()), None)
            if shown is not None:
                left_out = f" ({shown.answers.left_out} left out)" if shown.answers.left_out else ""
                rows.append(f"{task} {shown.answers.rows:,}{left_out}")
        made = [result.made for result in self.results]
        names = ("command", "machine", "tc_ray")
        found = [
            ("recipe", without_folders(file.recipe)),
            *((f"task {task}", _settings(values)) for task, values in file.tasks.items()),
            ("seeds", ", ".join(map(str, file.seeds))),
            (f"{file.rows} rows", ", ".join(rows)),
            *((name, "; ".join(sorted({of[name] for of in made if name in of}))) for name in names),
            ("time", f"{sum(result.wall_seconds for result in self.results) / 3600:.1f} hours over all cells"),
            ("missing", ", ".join(numbers.missing)),
        ]
        return [(name, value) for name, value in found if value]

    def variants(self) -> list[tuple[str, str]]:
        """(line, what it is)."""
        found = []
        for name, values in self.study.file.variants.items():
            settings, control = _settings(values), values.get("control")
            parts = [CONTROLS[control]] if control else []
            parts += [settings] if settings else [] if control else ["the recipe as it is"]
            found.append((name, "; ".join(parts)))
        return found

    def _scores(self) -> Part:
        numbers = self.numbers
        tables = [
            Table(
                title, ("", *numbers.tasks, "mean"), [self._score_row(line) for line in lines if line in numbers.lines]
            )
            for title, lines in (self.study.file.tables or {"": list(numbers.lines)}).items()
        ]
        text = (
            "Mean over seeds, with the 95% interval over seeds by Student's t; a single seed has the interval over its rows. "
            f"A line with {PILOT} is the Pilot of that line alone."
        )
        pictures = []
        for task in numbers.tasks:
            points = [point for line in numbers.lines if (point := self._point(line, task)) is not None]
            if len(points) > 1:
                pictures.append(compute_chart(task, points, percent=self._is_share(task)))
        return Part("Scores", text, tables, pictures)

    def _point(self, line: str, task: str) -> Point | None:
        score, compute = self.numbers.score(line, task), self.numbers.compute(line, task, self.base)
        if score is None or compute is None:
            return None
        fused = any(shown.model.lam is not None for shown in self.numbers.at(line, task).values())
        return Point(line, compute, score, fused)

    def _score_row(self, line: str) -> list[str]:
        cells = [self._score(line, task) for task in self.numbers.tasks]
        return [line, *cells, _share(self.numbers.average(line), all(map(self._is_share, self.numbers.tasks)))]

    def _score(self, line: str, task: str) -> str:
        mean, seeds = self.numbers.score(line, task), len(self.numbers.seeds)
        fewer = f", {mean.seeds} of {seeds} seeds" if mean and mean.seeds < seeds else ""
        return _share(mean, self._is_share(task)) + fewer

    def _is_share(self, task: str) -> bool:
        found = (shown for line in self.numbers.lines for shown in self.numbers.at(line, task).values())
        return all(shown.answers.metric in KNOWS_RIGHT for shown in found)

    def _against(self, against: str) -> Part:
        numbers = self.numbers
        tests, pooled = numbers.tests(against), numbers.pooled_tests(against)
        rows = [
            [
                line,
                *(_tested(tests.get((line, task)), self._is_share(task)) for task in numbers.tasks),
                _tested(pooled.get(line), all(map(self._is_share, numbers.tasks))),
            ]
            for line in numbers.lines
            if line != against
        ]
        text = (
            f"Each line minus {against}: points, the 95% interval over seeds, and p. The test is paired by test row: the "
            "differences of all seeds at a row are added, and under the hypothesis each sum is as likely with the other sign "
            "(for one seed this is McNemar's exact test). So rows are the sample, and several seeds of one row count as one "
            "case. p is corrected by Holm's method over all lines and tasks of this table; those of the last column, over "
            "all tasks together, are a family of their own."
        )
        return Part(f"Against {against}", text, [Table("", ("", *numbers.tasks, "all tasks"), rows)], [])

    def _nll(self) -> Part:
        numbers = self.numbers
        rows = [
            [line, *(_number(numbers.nll(line, task), 4) for task in numbers.tasks)]
            for line in numbers.lines
            if any(numbers.nll(line, task) for task in numbers.tasks)
        ]
        text = "Nats per gold token, teacher-forced; mean over seeds. Lower is better."
        return Part("NLL", text, [Table("", ("", *numbers.tasks), rows)], [])

    def _costs(self) -> Part:
        numbers = self.numbers
        rows = [
            [line, *(_number(numbers.compute(line, task, self.base), 2) for task in numbers.tasks), self._trained(line)]
            for line in numbers.lines
        ]
        text = (
            "Training compute as a multiple of the Pilot's alone: seconds of the processors (on GPUs: of time) of rounds and "
            "Copilot steps, as measured in the cells; and the trained parameters."
        )
        return Part("Training compute", text, [Table("", ("", *numbers.tasks, "trained"), rows)], [])

    def _trained(self, line: str) -> str:
        for task in self.numbers.tasks:
            for shown in self.numbers.at(line, task).values():
                result, fused = shown.result, shown.model.lam is not None
                return f"{result.pilot_parameters + (result.copilot_parameters if fused else 0):,}"
        return "-"

    def _corrections(self) -> Part:
        numbers, sizes = self.numbers, dict[str, dict[str, Mean]]()
        rows = []
        for line in numbers.lines:
            found = {task: list(numbers.at(line, task).values()) for task in numbers.tasks}
            fused = {task: shown for task, shown in found.items() if shown and shown[0].model.lam is not None}
            if fused:
                rows.append([line, *(_fusion(fused.get(task, [])) for task in numbers.tasks)])
            for task, shown in fused.items():
                size = mean_of([s.model.correction for s in shown if s.model.correction is not None])
                if size is not None:
                    sizes.setdefault(line, {})[task] = size
        text = (
            "Lambda and space, as chosen on validation rows for each seed, and the error ratio E||p - p~||^2 / E||p - p^||^2 on "
            "gold tokens: below 1 the correction helps there (theorem 4.1)."
        )
        table = Table("", ("", *numbers.tasks), rows, texts=tuple(range(len(numbers.tasks) + 1)))
        return Part("Corrections", text, [table], [correction_chart(sizes)] if sizes else [])

    def markdown(self, stem: str) -> str:
        """The report as Markdown; its pictures are `<stem>-<name>.svg` beside it."""
        return _templates().get_template("study.md").render(report=self, stem=stem, title=self.title)

    @property
    def title(self) -> str:
        """Of the report."""
        return f"Results of the study {self.study.file.name}"

    def html(self) -> str:
        """The report as one page that loads nothing."""
        return render("study.html", package="tc_ray.study", title=self.title, report=self)

    def csv(self) -> str:
        """A line for each line, task and seed."""
        written = io.StringIO()
        table = csv.DictWriter(written, _COLUMNS, lineterminator="\n")
        table.writeheader()
        for line in self.numbers.lines:
            for task in self.numbers.tasks:
                for seed, shown in self.numbers.at(line, task).items():
                    table.writerow(
                        {"line": line, "task": task, "seed": seed, **self._csv_values(line, task, seed, shown)}
                    )
        return written.getvalue()

    def _csv_values(self, line: str, task: str, seed: int, shown: Shown) -> dict[str, Any]:
        values: dict[str, Any] = asdict(shown.model) | asdict(shown.answers) | asdict(shown.result)
        values |= {"value": shown.answers.value, "nll": shown.answers.mean_nll, "set": self.numbers.rows}
        of_base = self.numbers.at(self.base, task).get(seed)
        fused = shown.model.lam is not None
        seconds = shown.result.pilot_seconds + (shown.result.copilot_seconds if fused else 0.0)
        if of_base is not None and of_base.result.pilot_seconds:
            values["compute"] = seconds / of_base.result.pilot_seconds
        return {name: values[name] for name in _COLUMNS if name in values}

    def save(self, file: Path) -> list[Path]:
        """Write the Markdown to `file`, and page, CSV and pictures beside it. Returns all files."""
        pictures = [picture for part in self.parts for picture in part.pictures]
        texts = {
            file: self.markdown(file.stem),
            file.with_suffix(".html"): self.html(),
            file.with_suffix(".csv"): self.csv(),
            **{file.with_name(f"{file.stem}-{picture.name}.svg"): picture.file for picture in pictures},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_file(path, text)
        return list(texts)


def _templates() -> Environment:
    # Markdown: nothing is to be escaped as HTML
    loader = PackageLoader("tc_ray.study", "static")
    return Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)


def _settings(values: Mapping[str, Any]) -> str:
    """For a page that may be published: without secrets and places."""
    shown = (f"{key}={without_folders(value)}" for key, value in values.items() if key != "control")
    return ", ".join(map(redact_override, shown))


def _share(mean: Mean | None, percent: bool) -> str:
    if not percent:
        return _number(mean, 4)
    return "-" if mean is None else f"{100 * mean.value:.1f}{_ends(mean.interval, 100.0, '.1f')}"


def _number(mean: Mean | None, digits: int) -> str:
    return "-" if mean is None else f"{mean.value:.{digits}f}"


def _ends(interval: tuple[float, float], scale: float, form: str) -> str:
    low, high = interval
    return f" ({scale * low:{form}} to {scale * high:{form}})" if high < float("inf") else ""


def _tested(tested: Tested | None, percent: bool) -> str:
    if tested is None:
        return "-"
    scale, form = (100.0, "+.1f") if percent else (1.0, "+.4f")
    return f"{scale * tested.difference:{form}}{_ends(tested.interval, scale, form)}, p {tested.p:.2g}"


def _fusion(shown: list[Shown]) -> str:
    """Lambda and space of each seed, and the mean error ratio."""
    if not shown:
        return "-"
    chosen = [f"{s.model.lam:g} {s.model.space}" if s.model.lam else "0" for s in shown]
    ratios = mean_of([s.model.error_ratio for s in shown if s.model.error_ratio is not None])
    return ", ".join(chosen) + (f"; ratio {ratios.value:.3f}" if ratios else "")
