"""The evaluation report: what was measured, as JSON, as Markdown and as lines for a terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tc_ray.evaluation.selection import Comparison
from tc_ray.evaluation.teacher_forced import TeacherForced

SIGNIFICANT_P = 0.05
"""McNemar p below which a difference is called a gain."""


@dataclass(frozen=True)
class Report:
    """Pilot against fused on one test set, and how lambda was chosen.

    validation: rows of (space, lam, accuracy, wins, losses) on validation data. exported_lam: what the exported model uses.
    """

    data: str
    space: str
    lam: float
    feedback: str
    comparison: Comparison
    pilot_forced: TeacherForced | None
    fused_forced: TeacherForced | None
    validation: list[dict[str, Any]] = field(default_factory=list)
    seen_error_size: float | None = None
    heldout_error_size: float | None = None
    examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def helps(self) -> bool:
        """More wins than losses with a lambda that validation data chose."""
        return self.lam > 0 and self.comparison.wins > self.comparison.losses

    @property
    def exported_lam(self) -> float:
        """The chosen lambda, or 0 when the Copilot does not help."""
        return self.lam if self.helps else 0.0

    @property
    def verdict(self) -> str:
        """One plain sentence."""
        c = self.comparison
        if self.lam == 0:
            return "The Copilot does not help: no lambda beat the Pilot on validation data. The exported default is lambda 0."
        if not self.helps:
            return (
                f"The Copilot does not help: lambda {self.lam:g} won {c.wins} and lost {c.losses} of {c.rows} test rows. "
                "The exported default is lambda 0."
            )
        low, high = c.difference_interval
        size = f"{100 * (c.wins - c.losses) / c.rows:+.1f} points (95% interval {100 * low:+.1f} to {100 * high:+.1f}, p = {c.p_value:.2g})"
        if c.p_value < SIGNIFICANT_P:
            return f"The Copilot helps: {size}."
        return f"No gain is shown: {size} can be chance."

    def lines(self) -> list[str]:
        """The result as a plain-text table."""
        c = self.comparison
        rows = [["", "accuracy", "95% interval", "error ratio", "NLL", "token accuracy"]]
        fused_name = f"fused, lambda {self.lam:g} in {self.space} space"
        for name, correct, interval, forced in (
            ("Pilot", c.pilot_correct, c.pilot_interval, self.pilot_forced),
            (fused_name, c.fused_correct, c.fused_interval, self.fused_forced),
        ):
            measured = (
                [f"{forced.error_ratio:.3f}", f"{forced.nll:.4f}", f"{100 * forced.token_accuracy:.1f}%"]
                if forced
                else ["-"] * 3
            )
            rows.append(
                [
                    name,
                    f"{100 * correct / c.rows:.1f}%",
                    f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}",
                    *measured,
                ]
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return [
            *table,
            f"{c.rows} test rows of {self.data}: {c.wins} wins, {c.losses} losses, McNemar p = {c.p_value:.2g}",
            self.verdict,
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        fields = asdict(self)
        fields["comparison"] |= {
            "p_value": self.comparison.p_value,
            "pilot_interval": self.comparison.pilot_interval,
            "fused_interval": self.comparison.fused_interval,
            "difference_interval": self.comparison.difference_interval,
        }
        return fields | {"helps": self.helps, "exported_lam": self.exported_lam, "verdict": self.verdict}

    def markdown(self) -> str:
        """The report as Markdown: verdict, table, validation sweep, examples."""
        parts = ["# Evaluation", "", self.verdict, "", "```", *self.lines()[:-1], "```", ""]
        if self.validation:
            parts += [
                "## Choice of lambda on validation data",
                "",
                "| space | lambda | accuracy | wins | losses | NLL |",
                "|---|---|---|---|---|---|",
            ]
            parts += [
                f"| {row['space']} | {row['lam']:g} | {100 * row['accuracy']:.1f}% | {row['wins']} | {row['losses']} | {row['nll']:.4f} |"
                for row in self.validation
            ]
            parts.append("")
        if self.seen_error_size is not None and self.heldout_error_size is not None:
            sizes = (
                f"Mean squared error of the Pilot: {self.seen_error_size:.4f} in the last rounds of the log, "
                f"{self.heldout_error_size:.4f} on validation data. If the log's is far smaller, expect no gain."
            )
            parts += [sizes, ""]
        if self.examples:
            parts += ["## Changed answers", ""]
            for example in self.examples:
                parts += [
                    f"**{example['prompt'].strip()[-300:]}**",
                    "",
                    f"- answer: {example['answer']}",
                    f"- Pilot: `{example['pilot']}`",
                    f"- fused: `{example['fused']}`",
                    "",
                ]
        return "\n".join(parts)

    def save(self, folder: Path, stem: str = "evaluation") -> None:
        """Write `<stem>.json` and `<stem>.md`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        (folder / f"{stem}.md").write_text(self.markdown())
