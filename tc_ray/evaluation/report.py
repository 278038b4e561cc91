"""The evaluation report: what was measured, as JSON, as Markdown and as lines for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tc_ray.data.prepared.folder import LeftOut
from tc_ray.evaluation.metric import Measure
from tc_ray.evaluation.statistics import Comparison
from tc_ray.evaluation.teacher_forced import TeacherForced
from tc_ray.files import finite, write_file, write_json

SIGNIFICANT_P = 0.05
"""McNemar p below which a difference counts as a gain."""


@dataclass(frozen=True)
class Gain:
    """Difference fused - Pilot that decides the verdict, with its 95% interval. shown: it is unlikely to be chance."""

    text: str
    size: float
    shown: bool


@dataclass(frozen=True)
class Report:
    """Pilot against fused on one test set, and how lambda was chosen.

    right_name, score_name: names of what counts as right and of what lambda is chosen by. measures: further measures; the
    one named as the score, if any, decides the verdict, else wins and losses do. validation: rows of (space, lam, score,
    right, wins, losses, ...) on validation data. left_out: rows missing from "validation" and "test". validation_rows: rows
    that lambda was chosen on. no_copilot: why there is no Copilot; both sides of the comparison are then the Pilot.
    """

    data: str
    space: str
    lam: float
    feedback: str
    comparison: Comparison
    pilot_forced: TeacherForced | None
    fused_forced: TeacherForced | None
    right_name: str = "accuracy"
    score_name: str = "accuracy"
    measures: list[Measure] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, str]] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    validation_rows: int = 0
    no_copilot: str | None = None

    @property
    def gain(self) -> Gain:
        """What the test rows show about the Copilot."""
        deciding = next((measure for measure in self.measures if measure.name == self.score_name), None)
        if deciding is not None:
            low, high = deciding.difference_interval
            text = f"{deciding.name} {_points(deciding.difference)} points (95% interval {_points(low)} to {_points(high)})"
            return Gain(text, deciding.difference, low > 0)
        c = self.comparison
        low, high = c.difference_interval
        size = (c.wins - c.losses) / c.rows
        text = f"{100 * size:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f}, p = {c.p_value:.2g})"
        return Gain(text, size, c.p_value < SIGNIFICANT_P)

    @property
    def helps(self) -> bool:
        """Better on the test rows, with a lambda that validation data chose."""
        return self.lam > 0 and self.gain.size > 0

    @property
    def exported_lam(self) -> float:
        """Lambda of the exported model: the chosen one, or 0 if the Copilot does not help."""
        return self.lam if self.helps else 0.0

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        c = self.comparison
        if self.no_copilot is not None:
            return (
                f"There is no Copilot: {self.no_copilot}. The Pilot alone was measured, and is exported with lambda 0."
            )
        if self.lam == 0:
            return "The Copilot does not help: no lambda beat the Pilot on validation data. The exported default is lambda 0."
        if not self.helps:
            how = self.gain.text if self.measures else f"it won {c.wins} and lost {c.losses} of {c.rows} test rows"
            return f"The Copilot does not help: with lambda {self.lam:g}, {how}. The exported default is lambda 0."
        if self.gain.shown:
            return f"The Copilot helps: {self.gain.text}."
        return f"No gain is shown: {self.gain.text} can be chance."

    def lines(self) -> list[str]:
        """The result as plain-text tables."""
        c = self.comparison
        given = self.left_out.get("test", LeftOut()).given(c.rows)
        rows = [["", "rows", self.right_name, "95% interval", "error ratio", "NLL", "token accuracy"]]
        fused_name = f"fused, lambda {self.lam:g} in {self.space} space"
        sides = [
            ("Pilot", c.pilot_correct, c.pilot_interval, self.pilot_forced),
            (fused_name, c.fused_correct, c.fused_interval, self.fused_forced),
        ]
        for name, correct, interval, forced in sides[:1] if self.no_copilot else sides:
            measured = ["-"] * 3
            if forced:
                measured = [f"{forced.error_ratio:.3f}", f"{forced.nll:.4f}", f"{100 * forced.token_accuracy:.1f}%"]
            count = f"{c.rows} of {given}" if given > c.rows else str(c.rows)
            ends = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
            rows.append([name, count, f"{100 * correct / c.rows:.1f}%", ends, *measured])
        against = "" if self.no_copilot else f": {c.wins} wins, {c.losses} losses, McNemar p = {c.p_value:.2g}"
        lines = [*_aligned(rows), *self._measure_lines(), f"{self._counted('test', c.rows)} of {self.data}{against}"]
        if self.validation_rows:
            lines.append(f"lambda was chosen on {self._counted('validation', self.validation_rows)}")
        return [*lines, self.verdict]

    def _counted(self, part: str, rows: int) -> str:
        return self.left_out.get(part, LeftOut()).counted(rows, part)

    def _measure_lines(self) -> list[str]:
        if not self.measures:
            return []
        rows = [["%", "Pilot", "95% interval", "fused", "95% interval", "difference", "95% interval, paired"]]
        for m in self.measures:
            sides = [
                cell
                for mean, interval in ((m.pilot, m.pilot_interval), (m.fused, m.fused_interval))
                for cell in (f"{100 * mean:.2f}", " to ".join(f"{100 * end:.2f}" for end in interval))
            ]
            rows.append([m.name, *sides, _points(m.difference), " to ".join(map(_points, m.difference_interval))])
        return ["", *_aligned(rows), ""]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        fields = asdict(self)
        derived = ("p_value", "pilot_interval", "fused_interval", "difference_interval")
        fields["comparison"] |= {name: getattr(self.comparison, name) for name in derived}
        # by name, so that the tracker logs each number as a metric; MLflow refuses names with an @
        fields["measures"] = {m.pop("name").lower().replace("@", "_at_"): m for m in fields["measures"]}
        return fields | {"helps": self.helps, "exported_lam": self.exported_lam, "verdict": self.verdict}

    def markdown(self) -> str:
        """The report as Markdown: verdict, tables, validation sweep, examples."""
        names = {"score": self.score_name, "right": self.right_name}
        if self.score_name == self.right_name:
            del names["score"]
        loader = PackageLoader("tc_ray.evaluation", "static")
        # Markdown: nothing is to be escaped as HTML
        templates = Environment(loader=loader, trim_blocks=True, undefined=StrictUndefined, autoescape=False)
        return templates.get_template("report.md").render(report=self, names=names)

    def save(self, folder: Path, stem: str = "evaluation") -> None:
        """Write `<stem>.json` (null for what is not finite) and `<stem>.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{stem}.json", finite(self.to_dict()))
        write_file(folder / f"{stem}.md", self.markdown().encode("utf-8", "backslashreplace"))


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"
