"""The choice of (fusion space, lambda) on validation rows: the whole grid teacher-forced, then the best decoded.

One teacher-forced pass gives every lambda. For choice and nll its scores are the metric, and decide. Else the two best and
lambda 0 are decoded, and the metric decides among these three. The two best: for exact_match by the share of rows whose gold
tokens are all ranked first, near ties by NLL; for ranking, chrf and a function of the user, by NLL. The rule itself is
`statistics.choose`. Called by `procedure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tc_ray.config.fusion import FusionSection
from tc_ray.config.section import Metric
from tc_ray.evaluation.compare import forced_means
from tc_ray.evaluation.passes import Pass
from tc_ray.evaluation.pool import Pool
from tc_ray.evaluation.rows import RowResult, RowSet
from tc_ray.evaluation.scores import decoded_as, forced_result, result
from tc_ray.evaluation.sources import ModelSource
from tc_ray.evaluation.statistics import Choice, Comparison, choose, preferred
from tc_ray.models.folder import SPACES

DECODED = 2
"""Candidates besides lambda 0 that are decoded."""


@dataclass(frozen=True)
class Chosen:
    """Space and lambda of a model. how: where they come from, for the report. grid: what was tried, a row per choice: `forced`
    is the score of teacher forcing that pre-selects, `score` and `right` are those of the metric (None: not decoded)."""

    space: str
    lam: float
    feedback: str
    how: str
    rows: int = 0
    grid: tuple[dict[str, Any], ...] = ()

    @property
    def choice(self) -> Choice:
        """As the measures name it."""
        return self.space, self.lam


@dataclass(frozen=True)
class Passes:
    """The passes of a source over row sets. labels: items to rank, for the metric ranking."""

    pool: Pool
    source: ModelSource
    fusion: FusionSection
    feedback: str
    labels: tuple[str, ...] = ()

    def forced(self, rows: RowSet, choices: Sequence[Choice]) -> list[Any]:
        """Teacher-forced sums of every row, by choice."""
        return self._run("options" if rows.metric == "choice" else "forced", rows, choices)

    def said(self, rows: RowSet, choices: Sequence[Choice]) -> list[Any] | None:
        """What is decoded for every row, by choice; None for a metric that needs nothing decoded."""
        kind = decoded_as(rows.metric)
        return None if kind is None else self._run(kind, rows, choices)

    def _run(self, kind: Any, rows: RowSet, choices: Sequence[Choice]) -> list[Any]:
        fusion = self.fusion
        more: dict[str, Any] = {}
        if kind == "said":
            more = {"max_new_tokens": fusion.max_new_tokens, "num_beams": fusion.num_beams}
        elif kind == "ranked":
            more = {"beams": max(fusion.ranking.cutoffs), "labels": self.labels}
        batch = fusion.eval_batch_size
        return self.pool.run(Pass(kind, self.source, rows, tuple(choices), self.feedback, batch, **more))


def grid_of(fusion: FusionSection) -> list[Choice]:
    """Lambda 0, then every other of the grid in each space."""
    spaces = SPACES if fusion.space == "choose" else (fusion.space,)
    return [(spaces[0], 0.0), *((space, lam) for space in spaces for lam in fusion.lam_grid if lam > 0)]


def choose_lambda(passes: Passes, validation: RowSet) -> Chosen:
    """Choose on the validation rows. Lambda 0 is among the choices and wins ties."""
    choices = grid_of(passes.fusion)
    forced = passes.forced(validation, choices)
    grid = [_forced_row(choice, number, validation, forced) for number, choice in enumerate(choices)]
    decided = list(choices)
    if decoded_as(validation.metric) is not None and grid[0]["nll"] is not None:
        best = _to_decode(validation, choices, forced, [row["nll"] for row in grid])
        decided = [choice for number, choice in enumerate(choices) if number == 0 or choice in best]
    said = passes.said(validation, decided)
    results = {
        choice: results_of(validation, forced, choices.index(choice), said, number)
        for number, choice in enumerate(decided)
    }
    return Chosen(
        *_best(results, dict(zip(choices, grid, strict=True)), validation.metric),
        passes.feedback,
        f"chosen on {validation.left_out.counted(len(validation.rows), 'validation')}{_hint(validation, results)}",
        len(validation.rows),
        tuple(
            row | _decoded_row(results.get(choice), results[choices[0]])
            for choice, row in zip(choices, grid, strict=True)
        ),
    )


def results_of(
    rows: RowSet, forced: Sequence[Any], forced_at: int, said: Sequence[Any] | None, said_at: int
) -> list[RowResult]:
    """Results of all rows with one choice, from what `Passes` found; forced_at, said_at: its place among the choices of each."""
    return [
        result(row, rows, forced[row], forced_at, None if said is None else said[row][said_at])
        for row in range(len(rows.rows))
    ]


def _hint(validation: RowSet, results: Mapping[Choice, Sequence[RowResult]]) -> str:
    """Where no answer is exactly right, as of free text, all choices tie and lambda is 0: what to do."""
    if validation.metric != "exact_match" or any(one.right for rows in results.values() for one in rows):
        return ""
    return "; no answer was right with any lambda: for free text choose by fusion.metric chrf or nll, or a metric of your own"


def _best(
    results: Mapping[Choice, Sequence[RowResult]], grid: Mapping[Choice, Mapping[str, Any]], metric: Metric
) -> Choice:
    # a mean over rows of NLL per token would weigh long rows less: sums of nats are compared
    scores = {
        choice: [one.score * (one.tokens if metric == "nll" else 1) for one in rows] for choice, rows in results.items()
    }
    return choose(scores, {choice: row["nll"] for choice, row in grid.items() if row["nll"] is not None})


def _to_decode(
    rows: RowSet, choices: Sequence[Choice], forced: Sequence[Any], nll: Sequence[float]
) -> Sequence[Choice]:
    """The corrections that teacher forcing prefers: for exact_match by rows whose gold tokens are all ranked first, else by NLL."""
    likely = dict(zip(choices, nll, strict=True))
    if rows.metric != "exact_match":
        return sorted(choices[1:], key=likely.__getitem__)[:DECODED]
    found = {
        choice: [forced_result(row, rows, of_row, number) for row, of_row in enumerate(forced)]
        for number, choice in enumerate(choices)
        if number
    }
    first = {choice: [float(0 < one.tokens == one.first) for one in results] for choice, results in found.items()}
    return preferred(first, likely)[:DECODED]


def _forced_row(choice: Choice, number: int, rows: RowSet, found: Sequence[Any]) -> dict[str, Any]:
    results, pilot = ([forced_result(row, rows, of_row, at) for row, of_row in enumerate(found)] for at in (number, 0))
    means = dict(zip(("nll", "error_ratio", "token_accuracy"), forced_means(results, pilot), strict=True))
    gold = [one for one in results if one.tokens]
    all_first = sum(one.first == one.tokens for one in gold) / len(gold) if gold else None
    return {"space": choice[0], "lam": choice[1], "forced": all_first, **means}


def _decoded_row(results: Sequence[RowResult] | None, pilot: Sequence[RowResult]) -> dict[str, Any]:
    if results is None:
        return dict.fromkeys(("score", "right", "wins", "losses"))
    score = sum(one.score for one in results) / len(results)
    if pilot[0].right is None:
        return {"score": score, "right": None, "wins": None, "losses": None}
    compared = Comparison.of([bool(one.right) for one in pilot], [bool(one.right) for one in results])
    right = sum(bool(one.right) for one in results) / len(results)
    return {"score": score, "right": right, "wins": compared.wins, "losses": compared.losses}
