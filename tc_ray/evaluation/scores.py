"""What a model said or scored on a row, as right or wrong, and by how much: one function per metric. Pure.

exact_match: is the final answer the gold answer? choice: is the right option the likeliest, by its log-likelihood as it is
(sum), per token or per character? ranking: Hit@K = 1 if the item is among the first K, NDCG@K = 1 / log2(rank + 1) if it is,
else 0 (one relevant item per row, so the ideal DCG is 1). nll: nats per gold token. chrf: likeness of the decoded text to the gold
completion. module:function: what the user's function gives for the decoded text and its row. Called by `procedure`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

from tc_ray.config.named import load_named
from tc_ray.config.section import Metric, is_named
from tc_ray.evaluation.answers.likeness import chrf
from tc_ray.evaluation.answers.scoring import matches
from tc_ray.evaluation.rows import HeldOut, RowResult, RowSet
from tc_ray.text import first_line

OPTIONS_BY = ("sum", "token", "character")
NLL = 1
"""Its column in what a pass of gold completions gives."""
RIGHT_WITHIN = 10
"""Of a ranking, wins and losses are counted by Hit@10; NDCG@10 is its score."""
_VALUE_NAMES = {
    "exact_match": "accuracy",
    "choice": "accuracy",
    "ranking": f"NDCG@{RIGHT_WITHIN}",
    "nll": "NLL",
    "chrf": "chrF",
}
KNOWS_RIGHT = ("exact_match", "choice", "ranking")
"""Metrics by which a row is right or wrong; their values are shares of 1."""
COUNTED = ("exact_match", "choice")
"""Metrics whose value is the share of right rows."""


def value_name(metric: Metric) -> str:
    """What a metric's value is called; that of a function has its name."""
    return _VALUE_NAMES.get(metric, metric.partition(":")[2])


def decoded_as(metric: Metric) -> Literal["said", "ranked"] | None:
    """The pass that decodes what the metric scores; None: it scores what teacher forcing gives."""
    return None if metric in ("choice", "nll") else "ranked" if metric == "ranking" else "said"


class MetricError(RuntimeError):
    """The user's metric failed on a row; the message names set and row."""


class NoGoldError(ValueError):
    """Rows cannot be measured by their metric; the message names set, row and field."""


def hit_at(k: int, place: int | None) -> float:
    """1 if the item's place in the ranking (from 1; None: not ranked) is at most k, else 0."""
    return float(place is not None and place <= k)


def ndcg_at(k: int, place: int | None) -> float:
    """1 / log2(place + 1) if the item's place in the ranking (from 1; None: not ranked) is at most k, else 0."""
    return 1.0 / math.log2(place + 1) if place is not None and place <= k else 0.0


def gold_option(row: HeldOut) -> int | None:
    """The option that is the row's answer or completion, else the only one that states the answer."""
    for text in (row.answer, row.completion):
        if text in row.options:
            return row.options.index(text)
    stating = [number for number, option in enumerate(row.options) if matches(option, row.answer)]
    return stating[0] if len(stating) == 1 else None


def gold_text(row: HeldOut) -> str:
    """The text that a free one is compared with: the row's completion, else its answer."""
    return row.completion or row.answer


def check_gold(rows: RowSet, labels: Collection[str] = ()) -> None:
    """Raise NoGoldError for a row that lacks what the set's metric compares with. labels: the items of a ranking.

    Raises ConfigError: the metric is a function that cannot be imported.
    """
    if is_named(rows.metric):
        load_named(rows.metric, f"metric of {rows.name}")
    for number, row in enumerate(rows.rows):
        if rows.metric == "ranking" and row.answer not in labels:
            why, fix = "`answer` is no item", "only a run of item sequences (data.format: sequences) has items to rank"
        elif rows.metric == "choice" and gold_option(row) is None:
            why = "`answer` is none of its `options`" if row.options else "it has no `options`"
            fix = "give each row the completions to choose from, or name the task whose form makes them (--task, data.task)"
        elif rows.metric == "nll" and len(row.input_ids) == row.target_start:
            why, fix = "it has no completion", "give each row one (completion, output, or an assistant's message)"
        elif rows.metric == "chrf" and not gold_text(row).strip():
            why, fix = "it has neither completion nor answer", "give each row a text to compare with"
        else:
            continue
        raise NoGoldError(f"{rows.name} ({rows.source}), row {number}: metric {rows.metric}: {why}; {fix}")


def forced_result(number: int, rows: RowSet, forced: Any, choice: int) -> RowResult:
    """What teacher forcing says of a row's gold tokens, without a score. forced: what a pass `forced` or `options` found for it,
    of which `choice` counts."""
    row = rows.rows[number]
    tokens, by_choice = forced[gold_option(row)] if rows.metric == "choice" else forced
    error, nats, first = by_choice[choice]
    nll, squared = (nats / tokens, error) if tokens else (None, None)
    return RowResult(number, row.sample_id, None, 0.0, nll, tokens, "", squared, int(first))


def result(number: int, rows: RowSet, forced: Any, choice: int, said: Any) -> RowResult:
    """The whole result of a row. said: what was decoded with the choice; None for the metrics choice and nll."""
    bare = forced_result(number, rows, forced, choice)
    right, score, text, measures = _scored(rows.rows[number], rows, forced, said, choice, bare.nll)
    return replace(bare, right=right, score=score, said=text, measures=measures)


_Scored = tuple[bool | None, float, str, dict[str, float]]


def _scored(row: HeldOut, rows: RowSet, forced: Any, said: Any, choice: int, nll: float | None) -> _Scored:
    if rows.metric == "exact_match":
        right = matches(said, row.answer)
        return right, float(right), said, {}
    if rows.metric == "ranking":
        place, text = said
        return hit_at(RIGHT_WITHIN, place) > 0, ndcg_at(RIGHT_WITHIN, place), text, {"place": float(place or 0)}
    if rows.metric == "choice":
        chosen = {by: _chosen(row, forced, choice, by) for by in OPTIONS_BY}
        gold = gold_option(row)
        right = chosen[rows.option_by] == gold
        measures = {f"accuracy by {by}": float(number == gold) for by, number in chosen.items()}
        return right, float(right), row.options[chosen[rows.option_by]], measures
    if rows.metric == "nll":
        assert nll is not None
        return None, -nll, "", {}
    if rows.metric == "chrf":
        return None, chrf(said, gold_text(row)), said, {}
    return None, _own_score(said, row, rows), said, {}


def _own_score(said: str, row: HeldOut, rows: RowSet) -> float:
    function = load_named(rows.metric, f"metric of {rows.name}")
    where = f"{rows.metric}, sample {row.sample_id} of {rows.name} ({rows.source})"
    try:
        score = float(function(said, row))
    except Exception as error:
        raise MetricError(f"metric {where}: {type(error).__name__}: {first_line(error)}") from error
    if not math.isfinite(score):
        raise MetricError(f"metric {where}: gave {score}; give a finite number, higher for a better answer")
    return score


def _chosen(row: HeldOut, forced: Any, choice: int, by: str) -> int:
    """The likeliest option; of equal ones the first."""
    scores = []
    for option, (tokens, by_choice) in zip(row.options, forced, strict=True):
        over = {"sum": 1, "token": tokens, "character": len(option)}[by]
        scores.append(-by_choice[choice][NLL] / over)
    return scores.index(max(scores))


def ranking_measures(results: Sequence[RowResult], cutoffs: Sequence[int]) -> dict[str, list[float]]:
    """Hit@K and NDCG@K of each row, from the places."""
    places = [int(one.measures["place"]) or None for one in results]
    found = {f"Hit@{k}": [hit_at(k, place) for place in places] for k in cutoffs}
    return found | {f"NDCG@{k}": [ndcg_at(k, place) for place in places] for k in cutoffs}
