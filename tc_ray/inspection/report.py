"""The report: one self-contained HTML page on a log.

Invariant: its size is bounded, whatever the log's: rounds are joined into at most 120 columns and positions into at most 64,
and a bounded number of samples is shown. Every number comes with what it was taken over. Called by `tc-ray log report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tc_ray.files import write_file
from tc_ray.inspection import tables
from tc_ray.inspection.charts import heat_map, line_chart, reliability_chart
from tc_ray.inspection.colours import level
from tc_ray.inspection.page import READING, esc, legend_html, page, sample_html, table_html
from tc_ray.inspection.samples import Visit, across_epochs, find_visits, percent
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
    run = stats.metadata.run
    if len(stats.samples) == 0:
        left_out = f"; {stats.not_finite} rows hold numbers that are not finite" if stats.not_finite else ""
        raise ValueError(f"the log of run {run} has no target token to report on yet{left_out}")
    across = [(label, int(stats.samples.ids[place])) for label, place in across_epochs(stats.samples, ACROSS_EACH)]
    worst = [int(stats.samples.ids[place]) for place in stats.hardest(WORST)]
    visits = find_visits(log, list(dict.fromkeys([*(sample for _, sample in across), *worst])), rounds)
    facts = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in tables.facts(stats, texts))
    body = [
        f"<h1>Mistake Log of {esc(run)}</h1>",
        '<p class="lead">What the Pilot got wrong while it was trained, token by token.</p>',
        f'<dl class="facts">{facts}</dl>',
        _tiles(stats),
        _rounds(stats),
        _positions(stats),
        _repeats(stats),
        _confusions(stats, texts),
        _calibration(stats),
        _across(across, visits, texts),
        _hardest(worst, visits, texts),
        _footer(stats),
    ]
    return page(f"Mistake Log of {run}", "\n".join(body))


def _tiles(stats: LogStats) -> str:
    parts = stats.parts()
    spans = [f"{low}" if low == high else f"{low}-{high}" for low, high in (part["rounds"] for part in parts)]
    when = f"rounds {spans[0]} → {spans[1]}"

    def right(line: dict[str, Any], key: str) -> str:
        return "no data" if line[key] is None else percent(1.0 - line[key])

    loss = ["no data" if line["loss"] is None else f"{line['loss']:.3f}" for line in parts]
    group = 0 if stats.confidence.tokens[0].any() else 1
    gap = stats.confidence.gap(group)
    tiles = [
        (" → ".join(loss), f"nats per target token, {when}"),
        (" → ".join(right(line, "wrong_share") for line in parts), f"target tokens ranked first, {when}"),
        (" → ".join(right(line, "rows_with_mistake_share") for line in parts), f"answers without a mistake, {when}"),
        (
            "no data" if gap is None else f"{100 * gap:.1f} points",
            f"mean gap between probability and accuracy, {VISITED[group]}",
        ),
    ]
    shown = "".join(f'<div class="tile"><b>{esc(value)}</b><span>{esc(name)}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{shown}</div>'


def _rounds(stats: LogStats) -> str:
    bins = stats.bins
    totals = stats.by_round.binned(bins.index(np.arange(stats.first_round, stats.last_round + 1)), len(bins.spans))
    every = max(1, -(-stats.most_seen // EPOCH_MARKS))
    starts = [(seen + 1, int(stats.seen_from[seen])) for seen in range(1, stats.most_seen + 1, every)]
    epochs = [(epoch, first) for epoch, first in starts if first >= 0]
    loss = [("loss", _mean(totals.loss, totals.tokens))]
    accuracy = [
        ("tokens ranked first", 1.0 - _mean(totals.wrong, totals.tokens)),
        ("answers without a mistake", 1.0 - _mean(totals.mistaken, totals.rows)),
    ]
    charts = [
        line_chart("Loss (nats per target token)", loss, bins.spans, epochs=epochs),
        line_chart("Accuracy", accuracy, bins.spans, percent=True, epochs=epochs),
    ]
    note = (
        "Measured as the Pilot saw the examples, before it learned from them in that round; within the answer it was given "
        "the true tokens so far (teacher forcing)."
    )
    note += f" One point is {bins.width} rounds." if bins.width > 1 else ""
    note += " Dotted lines: an epoch begins." if epochs else ""
    return (
        f'<h2>Loss and accuracy by round</h2><p>{note}</p><div class="two">'
        + "".join(f"<figure>{chart}</figure>" for chart in charts)
        + f"</div>{_details(tables.by_round(stats, MAX_BINS))}"
    )


def _positions(stats: LogStats) -> str:
    found, used = stats.positions, stats.positions.used
    tokens = found.tokens[:, :used]
    parts = []
    for title, sums, scale in (
        ("Mean error by place in the answer", found.error, "mean error"),
        ("Where answers first go wrong", found.first_wrong, "share of answers"),
    ):
        values = _mean(sums[:, :used], tokens)
        high = _scale_end(float(np.nanmax(values)))
        chart = heat_map(title, values, stats.bins.spans, width=found.width, high=high)
        ends = legend_html("0%", percent(high).replace(".0%", "%"), scale)
        parts.append(f'<figure><div class="wide">{chart}</div>{ends}</figure>')
    joined = f" Each row is {found.width} tokens." if found.width > 1 else ""
    return (
        "<h2>Where an answer goes wrong</h2>"
        "<p>Across: rounds. Down: place in the answer, its first token on top. The upper map shows the mean error (the "
        "probability that was not on the true token). The lower one shows the share of answers, of those long enough, whose "
        f"first token not ranked first stands there.{joined}</p>" + "".join(parts)
    )


def _repeats(stats: LogStats) -> str:
    if stats.most_seen == 0:
        return ""
    table = tables.by_seen(stats)
    return (
        f"<h2>{esc(table.title)}</h2><p>In the first line the Pilot had never trained on the sample. Later lines are partly "
        f"memory.</p>{table_html(table)}"
    )


def _confusions(stats: LogStats, texts: TokenTexts) -> str:
    """A matrix of the tokens most often missed against what was predicted instead, and a longer list of them."""
    truths = [int(token) for token in stats.missed(MATRIX)]
    heading = "<h2>Which tokens are confused</h2>"
    if not truths:
        return heading + "<p>Every target token was ranked first.</p>"
    instead = {truth: dict(stats.tokens.instead_of(truth)) for truth in truths}
    total: dict[int, int] = {}
    for predicted, times in (pair for counts in instead.values() for pair in counts.items()):
        total[predicted] = total.get(predicted, 0) + times
    columns = sorted(total, key=lambda predicted: (-total[predicted], predicted))[:MATRIX]
    rows = []
    for truth in truths:
        missed = int(stats.tokens.missed[truth])
        counts = [instead[truth].get(predicted, 0) for predicted in columns]
        cells = [
            f'<td class="cell {f"e{level(times / missed)}" if times else "none"}">{times:,}</td>'
            for times in (*counts, missed - sum(counts))
        ]
        rows.append(f"<tr><td>{_token(truth, texts)}</td>{''.join(cells)}</tr>")
    names = "".join(f"<th>{_token(predicted, texts)}</th>" for predicted in columns)
    return (
        f"{heading}<p>Rows: the {len(truths)} tokens most often not ranked first. Columns: what was ranked first instead. "
        "Numbers are target tokens over all rounds; the colour is the share of the row. ␣ is a blank, ↵ a line end.</p>"
        '<div class="scroll"><table class="matrix"><thead><tr><th>true token ↓ &nbsp; predicted instead →</th>'
        f"{names}<th>others</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{_details(tables.missed_tokens(stats, texts, MISSED))}"
    )


def _details(table: tables.Table) -> str:
    return f"<details><summary>{esc(table.title)}</summary>{table_html(table)}</details>"


def _token(token: int, texts: TokenTexts) -> str:
    return f'<span class="tok">{esc(texts.quoted(token))}</span>'


def _calibration(stats: LogStats) -> str:
    return (
        "<h2>Calibration of the Pilot</h2><p>When the Pilot gives its first choice a probability, how often is it right? On "
        "the diagonal the two agree. The bars count the tokens of each probability. Samples on their first visit are apart "
        "from those that the Pilot had trained on before.</p>"
        f"{table_html(tables.calibration(stats))}"
        f'<figure class="narrow">{reliability_chart(stats.confidence, VISITED)}</figure>'
    )


def _across(across: list[tuple[str, int]], visits: dict[int, list[Visit]], texts: TokenTexts) -> str:
    heading = "<h2>The same sample across epochs</h2>"
    if not across:
        return heading + "<p>Each sample was visited once in these rounds: there is nothing to compare.</p>"
    blocks = [sample_html(visits[sample], texts, badge=label, short=True) for label, sample in across]
    return (
        f"{heading}<p>Samples whose loss fell most (learned), rose most (got worse), or was still largest at their last visit "
        f"(still hard). {esc(READING)}</p>{legend_html()}{''.join(blocks)}"
    )


def _hardest(worst: list[int], visits: dict[int, list[Visit]], texts: TokenTexts) -> str:
    blocks = []
    for sample in worst:
        found = visits[sample]
        loss, tokens = sum(float(v.loss.sum()) for v in found), sum(len(v.loss) for v in found)
        badge = f"mean loss {loss / tokens:.3f} over {len(found)} round{'s' * (len(found) > 1)}"
        blocks.append(sample_html(found[-1:], texts, badge=badge, short=True))
    return (
        "<h2>Hardest samples</h2><p>The samples of the largest mean loss per target token over all their visits, as they were "
        f"at the last one. Read them for wrong labels.</p>{legend_html()}{''.join(blocks)}"
    )


def _footer(stats: LogStats) -> str:
    return (
        "<footer><p><b>Words.</b> Round: one optimizer step of the Pilot. Visit: a sample in one round. Error of a token: 1 "
        "minus the probability that the Pilot gave it. Loss: the negative logarithm of that probability, in nats. Ranked "
        "first: no other token had a larger probability. Missed: not ranked first. Place: counted from 1 at the first token "
        f"of the answer.</p><p>Read from table version {stats.version} by tc-ray log report. This page loads nothing from "
        "anywhere.</p></footer>"
    )


def _mean(sums: Array, counts: Array) -> Array:
    """sums / counts, NaN without a count."""
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)


def _scale_end(value: float) -> float:
    """The next round number at or above a share."""
    return next((end for end in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if end >= value), 1.0)
