"""The report of an evaluation: verdicts, tables and tests, as JSON, Markdown, CSV and lines for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tc_ray.evaluation.choose import Chosen
from tc_ray.evaluation.compare import POOLED, Line, Pair, averages
from tc_ray.evaluation.rows import RowResult, RowSet
from tc_ray.evaluation.scores import COUNTED, KNOWS_RIGHT, value_name
from tc_ray.evaluation.sources import ModelSource
from tc_ray.files import finite, write_file, write_json

SIGNIFICANT_P = 0.05
"""p below which a difference counts as a gain."""
MAX_EXAMPLES = 12
COLUMNS = (
    "model", "set", "metric", "rows", "left_out", "value", "low", "high", "nll", "error_ratio", "token_accuracy", "lam",
    "space",
)  # fmt: skip
"""Of report.csv."""


@dataclass(frozen=True)
class Verdict:
    """What the test rows say about the Copilot of one source. pair: fused against Pilot, on all sets together where there are
    several; None without a Copilot, or where lambda is 0. of_run: its lambda was chosen, not exported. exports: an export follows."""

    chosen: Chosen
    pair: Pair | None
    no_copilot: str | None
    of_run: bool = True
    exports: bool = False

    @property
    def helps(self) -> bool:
        """Better on the test rows, with a lambda that validation data chose."""
        return self.pair is not None and self.pair.better

    @property
    def exported_lam(self) -> float:
        """Lambda of the exported model: the chosen one, or 0 if the Copilot does not help."""
        return self.chosen.lam if self.helps else 0.0

    @property
    def gain(self) -> str:
        """The difference in words."""
        pair = self.pair
        assert pair is not None
        name = "" if pair.metric in COUNTED else f"{value_name(pair.metric)} "
        scale, unit, digits = (100, " points", 1 if not name else 2) if pair.metric in KNOWS_RIGHT else (1, "", 4)
        size, low, high = (f"{scale * end:+.{digits}f}" for end in (pair.difference, pair.low, pair.high))
        return f"{name}{size}{unit} (95% interval {low} to {high}, p = {pair.p:.2g})"

    def __str__(self) -> str:
        """One plain sentence."""
        exported = " The exported default is lambda 0." if self.exports else ""
        if self.no_copilot is not None:
            exported = ", and is exported with lambda 0" if self.exports else ""
            return f"There is no Copilot: {self.no_copilot}. The Pilot alone was measured{exported}."
        if self.pair is None and not self.of_run:
            return "The fused model is its Pilot: lambda is 0."
        if self.pair is None:
            return f"The Copilot does not help: no lambda beat the Pilot on validation data.{exported}"
        if not self.helps:
            pair, counted = self.pair, self.pair.metric in COUNTED
            how = f"it won {pair.wins} and lost {pair.losses} of {pair.rows} test rows" if counted else self.gain
            return f"The Copilot does not help: with lambda {self.chosen.lam:g}, {how}.{exported}"
        if self.pair.p < SIGNIFICANT_P:
            return f"The Copilot helps: {self.gain}."
        return f"No gain is shown: {self.gain} can be chance."


@dataclass(frozen=True)
class Report:
    """Models on sets. measured: by source and set, a Pilot before its fused model. data: what each set is. examples: changed answers
    of the first source on the first set. exports: an export of the first source follows."""

    measured: Sequence[Line]
    pairs: Sequence[Pair]
    sources: Mapping[str, ModelSource]
    chosen: Mapping[str, Chosen]
    data: Mapping[str, str]
    examples: Sequence[Mapping[str, str]] = field(default_factory=tuple)
    exports: bool = False

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Of each source that has a Copilot, or should have one."""
        found = {}
        for name, source in self.sources.items():
            if source.copilot is None and source.no_copilot is None:
                continue
            pairs = [pair for pair in self.pairs if (pair.a, pair.b) == (f"{name}/pilot", name)]
            # on all sets, else on one that knows right and wrong
            pair = min(pairs, key=lambda pair: (pair.set != POOLED, pair.wins is None), default=None)
            pair = pair if self.chosen[name].lam else None
            found[name] = Verdict(
                self.chosen[name], pair, source.no_copilot, source.settings is None, exports=self.exports
            )
        return found

    @property
    def first(self) -> Verdict:
        """The verdict of a run's report."""
        return next(iter(self.verdicts.values()))

    def lines(self) -> list[str]:
        """The result for a terminal: table, what was left out, tests of each Copilot, verdicts."""
        return [*self.tables(), *self._sentences()]

    def tables(self) -> list[str]:
        """Plain-text tables: models on sets, further measures, averages; then what the sets and choices are."""
        rows = [["model", "set", "rows", "metric", "value", "95% interval", "error ratio", "NLL", "token accuracy"]]
        for line in self.measured:
            given = line.left_out.given(line.rows)
            count = f"{line.rows} of {given}" if given > line.rows else str(line.rows)
            rows.append(
                [
                    line.model,
                    line.set,
                    count,
                    value_name(line.metric),
                    _shown(line, line.value),
                    f"{_shown(line, line.low, bare=True)} to {_shown(line, line.high, bare=True)}",
                    number(line.error_ratio, "%.3f"),
                    number(line.nll, "%.4f"),
                    percent(line.token_accuracy, 1),
                ]
            )
        text = [*_aligned(rows), *self._measures()]
        if mean := averages(self.measured):
            text += ["", *_aligned([["model", "average over sets"], *([name, percent(mean[name])] for name in mean)])]
        text.append("")
        counted = {line.set: line for line in self.measured}
        text += [
            f"{name}: {line.left_out.counted(line.rows, 'test')} of {self.data[name]}" for name, line in counted.items()
        ]
        for name, choice in self.chosen.items():
            if self.sources[name].copilot is not None:
                where = f" in {choice.space} space" if choice.lam else ""
                text.append(f"{name}: lambda {choice.lam:g}{where}, {choice.how}")
        return text

    def _measures(self) -> list[str]:
        names = list(dict.fromkeys(name for line in self.measured for name in line.measures))
        if not names:
            return []
        rows = [["%", *(f"{line.model} on {line.set}" for line in self.measured if line.measures)]]
        for name in names:
            found = [line.measures.get(name) for line in self.measured if line.measures]
            cells = [
                "" if one is None else f"{100 * one.value:.2f} ({100 * one.low:.2f} to {100 * one.high:.2f})"
                for one in found
            ]
            rows.append([name, *cells])
        return ["", *_aligned(rows)]

    def _sentences(self) -> list[str]:
        found = []
        for pair in self.pairs:
            if pair.a == f"{pair.b}/pilot" and self.chosen[pair.b].lam:
                won = "" if pair.wins is None else f": {pair.wins} wins, {pair.losses} losses"
                found.append(
                    f"{pair.b} against its Pilot on {pair.set}{won}, p = {pair.p:.2g}, {pair.p_holm:.2g} corrected"
                )
        prefix = len(self.verdicts) > 1
        return found + [f"{name}: {one}" if prefix else str(one) for name, one in self.verdicts.items()]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready. `results` is by model and set, so that a tracker can log each number."""
        results: dict[str, Any] = {}
        for line in self.measured:
            fields = asdict(line) | {"left_out": asdict(line.left_out)}
            results.setdefault(line.model, {})[line.set] = {
                k: v for k, v in fields.items() if k not in ("model", "set")
            }
        sources = {
            name: {
                "pilot": source.pilot,
                "copilot": source.copilot,
                "weights": source.weights,
                "no_copilot": source.no_copilot,
                **asdict(self.chosen[name]),
            }
            for name, source in self.sources.items()
        }
        for name, verdict in self.verdicts.items():
            sources[name] |= {"verdict": str(verdict), "helps": verdict.helps}
            sources[name] |= {"exported_lam": verdict.exported_lam} if self.exports else {}
        return {
            "results": results,
            "averages": averages(self.measured),
            "sources": sources,
            "data": dict(self.data),
            "pairs": [asdict(pair) for pair in self.pairs],
            "examples": [dict(example) for example in self.examples],
        }

    def markdown(self) -> str:
        """The report as Markdown: verdicts, tables, choice of lambda, tests, examples."""
        loader = PackageLoader("tc_ray.evaluation", "static")
        # Markdown: nothing is to be escaped as HTML
        templates = Environment(loader=loader, trim_blocks=True, undefined=StrictUndefined, autoescape=False)
        templates.globals |= {"number": number, "percent": percent, "difference": _difference}
        verdicts = [f"{name}: {one}" for name, one in self.verdicts.items()]
        return templates.get_template("report.md").render(report=self, verdicts=verdicts, tables=self.tables())

    def csv(self) -> str:
        """A line for each model and set."""
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for line in self.measured:
            table.writerow(asdict(line) | {"left_out": line.left_out.given(line.rows) - line.rows})
        return text.getvalue()

    def save(self, folder: Path) -> None:
        """Write report.json (null for what is not finite), report.md and report.csv."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", finite(self.to_dict()))
        for name, text in (("report.md", self.markdown()), ("report.csv", self.csv())):
            write_file(folder / name, text.encode("utf-8", "backslashreplace"))


def examples_of(rows: RowSet, pilot: Sequence[RowResult], fused: Sequence[RowResult] = ()) -> list[dict[str, str]]:
    """Rows that one of the two has right and the other has not."""
    changed = [(a, b) for a, b in zip(pilot, fused, strict=False) if a.right != b.right][:MAX_EXAMPLES]
    return [
        {"prompt": rows.rows[a.row].prompt, "answer": rows.rows[a.row].answer, "pilot": a.said, "fused": b.said}
        for a, b in changed
    ]


def number(value: float | None, form: str) -> str:
    """The number as text, "-" for none."""
    return "-" if value is None else form % value


def percent(share: float | None, digits: int = 2) -> str:
    """A share in percent, "-" for none."""
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def _shown(line: Line, value: float, *, bare: bool = False) -> str:
    """A value of the line's metric: a share of 1 in percent, an NLL or what a function gives as it is."""
    if line.metric not in KNOWS_RIGHT:
        return f"{value:.4f}"
    text = percent(value, 2 if line.metric == "ranking" else 1)
    return text.rstrip("%") if bare else text


def _difference(pair: Pair) -> str:
    """Difference and interval, as two cells."""
    scale, form = (100, "%+.2f") if pair.metric in KNOWS_RIGHT else (1, "%+.4f")
    size, low, high = (form % (scale * end) for end in (pair.difference, pair.low, pair.high))
    return f"{size} | {low} to {high}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
