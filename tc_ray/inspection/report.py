"""The report: one self-contained HTML page on a log.

Invariant: its size is bounded, whatever the log's: rounds are joined into at most 120 columns and positions into at most 64,
and a bounded number of samples is shown. Every number comes with what it was taken over. Called by `tc-ray log report`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from tc_ray.files import write_file
from tc_ray.inspection import tables
from tc_ray.inspection.charts import heat_map, line_chart, reliability_chart
from tc_ray.inspection.colours import level
from tc_ray.inspection.page import render, sample
from tc_ray.inspection.samples import across_epochs, find_visits, percent
from tc_ray.inspection.stats import MAX_BINS, LogStats, collect
from tc_ray.inspection.tables import VISITED
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array

WORST = 12
ACROSS_EACH = 3
EPOCH_MARKS = 15
MATRIX = 14
MISSED = 30


def write_report(log: MistakeLog, texts: TokenTexts, out: Path, rounds: tuple[int, int] | None = None) -> None:
    """Write the page of a log; a page that stands there is replaced whole.

    Raises:
        ValueError: the log has no target token (in these rounds). OSError: `out` cannot be written.
    """
    write_file(out, report_page(log, texts, rounds))


def report_page(log: MistakeLog, texts: TokenTexts, rounds: tuple[int, int] | None = None) -> str:
    """The page as text.

    Raises:
        ValueError: the log has no target token (in these rounds).
    """
    stats = collect(log, rounds)
    found = stats.samples
    if len(found) == 0:
        left_out = f"; {stats.not_finite} rows hold numbers that are not finite" if stats.not_finite else ""
        raise ValueError(f"the log of run {stats.metadata.run} has no target token to report on yet{left_out}")
    across = [(label, int(found.ids[place])) for label, place in across_epochs(found, ACROSS_EACH)]
    worst = {int(found.ids[i]): (float(found.mean_loss[i]), int(found.visits[i])) for i in stats.hardest(WORST)}
    visits = find_visits(log, list(dict.fromkeys([*(sample for _, sample in across), *worst])), rounds)
    hardest = []
    for id, (loss, times) in worst.items():
        badge = f"mean loss {loss:.3f} over {times} round{'s' * (times > 1)}"
        hardest.append(sample(visits[id][-1:], texts, badge=badge, short=True))
    epochs = _epochs(stats)
    return render(
        "report.html",
        title=f"Mistake Log of {stats.metadata.run}",
        stats=stats,
        texts=texts,
        facts=tables.facts(stats, texts),
        tiles=_tiles(stats),
        epochs=epochs,
        lines=_lines(stats, epochs),
        maps=_maps(stats),
        matrix=_matrix(stats, texts),
        reliability=reliability_chart(stats.confidence, VISITED),
        by_round=tables.by_round(stats, MAX_BINS),
        by_seen=tables.by_seen(stats),
        missed=tables.missed_tokens(stats, texts, MISSED),
        calibration=tables.calibration(stats),
        across=[sample(visits[id], texts, badge=label, short=True) for label, id in across],
        hardest=hardest,
    )


def _tiles(stats: LogStats) -> list[tuple[str, str]]:
    """(value, name) of the numbers on top."""
    parts = stats.parts()
    spans = [f"{low}" if low == high else f"{low}-{high}" for low, high in (part["rounds"] for part in parts)]
    when = f"rounds {spans[0]} → {spans[1]}"

    def change(key: str, shown: Callable[[float], str]) -> str:
        return " → ".join("no data" if line[key] is None else shown(line[key]) for line in parts)

    def right(share: float) -> str:
        return percent(1.0 - share)

    group = 0 if stats.confidence.tokens[0].any() else 1
    gap = stats.confidence.gap(group)
    shown_gap = "no data" if gap is None else f"{100 * gap:.1f} points"
    return [
        (change("loss", "{:.3f}".format), f"nats per target token, {when}"),
        (change("wrong_share", right), f"target tokens ranked first, {when}"),
        (change("rows_with_mistake_share", right), f"answers without a mistake, {when}"),
        (shown_gap, f"mean gap between probability and accuracy, {VISITED[group]}"),
    ]


def _epochs(stats: LogStats) -> list[tuple[int, int]]:
    """(epoch, its first round) of some epochs, the first one left out."""
    every = max(1, -(-stats.most_seen // EPOCH_MARKS))
    starts = [(seen + 1, int(stats.seen_from[seen])) for seen in range(1, stats.most_seen + 1, every)]
    return [(epoch, first) for epoch, first in starts if first >= 0]


def _lines(stats: LogStats, epochs: list[tuple[int, int]]) -> list[Markup]:
    spans, totals = stats.bins.spans, stats.by_bin
    loss = [("loss", _mean(totals.loss, totals.tokens))]
    accuracy = [
        ("tokens ranked first", 1.0 - _mean(totals.wrong, totals.tokens)),
        ("answers without a mistake", 1.0 - _mean(totals.mistaken, totals.rows)),
    ]
    return [
        line_chart("Loss (nats per target token)", loss, spans, epochs=epochs),
        line_chart("Accuracy", accuracy, spans, percent=True, epochs=epochs),
    ]


def _maps(stats: LogStats) -> list[tuple[Markup, str, str]]:
    """(chart, end of its scale, name of the scale) of the heat maps."""
    found, used = stats.positions, stats.positions.used
    maps = []
    for title, sums, scale in (
        ("Mean error by place in the answer", found.error, "mean error"),
        ("Where answers first go wrong", found.first_wrong, "share of answers"),
    ):
        values = _mean(sums[:, :used], found.tokens[:, :used])
        high = _scale_end(float(np.nanmax(values)))
        chart = heat_map(title, values, stats.bins.spans, width=found.width, high=high)
        maps.append((chart, percent(high).replace(".0%", "%"), scale))
    return maps


def _matrix(stats: LogStats, texts: TokenTexts) -> dict[str, Any]:
    """The tokens most often missed (rows) against what was predicted instead (columns, the last one: all others)."""
    instead = {int(truth): dict(stats.tokens.instead_of(int(truth))) for truth in stats.missed(MATRIX)}
    total: Counter[int] = Counter()
    for counts in instead.values():
        total.update(counts)
    columns = sorted(total, key=lambda predicted: (-total[predicted], predicted))[:MATRIX]
    rows = []
    for truth, counts in instead.items():
        missed = int(stats.tokens.missed[truth])
        shown = [counts.get(predicted, 0) for predicted in columns]
        cells = [(times, f"e{level(times / missed)}" if times else "none") for times in (*shown, missed - sum(shown))]
        rows.append((texts.quoted(truth), cells))
    return {"columns": [texts.quoted(predicted) for predicted in columns], "rows": rows} if rows else {}


def _mean(sums: Array, counts: Array) -> Array:
    """sums / counts, NaN without a count."""
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)


def _scale_end(value: float) -> float:
    """The next round number at or above a share."""
    return next((end for end in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if end >= value), 1.0)
