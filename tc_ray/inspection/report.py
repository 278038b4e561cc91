"""The report: one self-contained HTML page on a log, for whoever opens the run first.

Invariant: its size is bounded whatever the log's: rounds are joined into at most 120 columns and positions into at most 64,
and a bounded number of samples is shown. Every figure comes with the number it was taken over. Called by `tc-ray log report`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tc_ray.files import write_file
from tc_ray.inspection.charts import Chart, Line, heat_map, line_chart, reliability_chart
from tc_ray.inspection.confusion import confusion_html
from tc_ray.inspection.page import esc, legend_html, page, table_html
from tc_ray.inspection.rows import Array
from tc_ray.inspection.sample_page import READING, sample_block
from tc_ray.inspection.sights import across_epochs, find_sights, percent
from tc_ray.inspection.stats import LogStats, collect
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog

WORST = 12
ACROSS_EACH = 3
SIGHTS = 12
TOKENS = 160
PROMPT = 1200
SEEN_ROWS = 16
MARKS = 15


def write_report(log: MistakeLog, texts: TokenTexts, out: Path, rounds: tuple[int, int] | None = None) -> None:
    """Write the page of a log; a page that stands there is replaced whole.

    Raises:
        ValueError: the log has no target token (in these rounds). OSError: `out` cannot be written.
    """
    html = report_page(log, texts, rounds)
    write_file(out, html)


def report_page(log: MistakeLog, texts: TokenTexts, rounds: tuple[int, int] | None = None) -> str:
    """The page as text.

    Raises:
        ValueError: the log has no target token (in these rounds).
    """
    stats = collect(log, rounds)
    if len(stats.samples) == 0:
        left_out = f"; {stats.not_finite} rows hold numbers that are not finite" if stats.not_finite else ""
        raise ValueError(f"the log of run {stats.metadata.run} has no target token to report on yet{left_out}")
    across = across_epochs(stats.samples, ACROSS_EACH)
    worst = [int(i) for i in stats.hardest(WORST)]
    ids = [int(stats.samples.ids[i]) for i in [place for _, place in across] + worst]
    sights = find_sights(log, list(dict.fromkeys(ids)), rounds)
    charts: dict[str, Chart] = {}
    body = [
        _header(stats, texts),
        _tiles(stats),
        _rounds(stats, charts),
        _positions(stats, charts),
        _seen(stats),
        confusion_html(stats, texts),
        _calibration(stats),
    ]
    body.append("<h2>The same sample across epochs</h2>")
    if across:
        body.append(
            "<p>Samples whose loss fell most (learned), rose most (got worse), or was still largest when they were last "
            f"met (still hard). {esc(READING)}</p>" + legend_html()
        )
    else:
        body.append("<p>Each sample was met once in these rounds: there is nothing to compare.</p>")
    for label, place in across:
        body.append(
            sample_block(
                sights[int(stats.samples.ids[place])],
                texts,
                badge=label,
                most_sights=SIGHTS,
                most_tokens=TOKENS,
                most_prompt=PROMPT,
            )
        )
    body.append(
        "<h2>Hardest samples</h2><p>The largest mean loss a target token over all rounds a sample was met in, shown as they "
        "were when last met. Often these are the examples to read for wrong labels.</p>" + legend_html()
    )
    for i in worst:
        found = sights[int(stats.samples.ids[i])]
        badge = f"mean loss {stats.samples.mean_loss[i]:.3f} over {len(found)} round{'s' * (len(found) > 1)}"
        body.append(sample_block(found[-1:], texts, badge=badge, most_tokens=TOKENS, most_prompt=PROMPT))
    body.append(_footer(stats))
    return page(
        f"Mistake Log of {stats.metadata.run}", "\n".join(body), {name: chart.hover for name, chart in charts.items()}
    )


def _header(stats: LogStats, texts: TokenTexts) -> str:
    meta = stats.metadata
    missing = stats.last_round - stats.first_round + 1 - stats.rounds_with_rows
    kept = f"all {meta.vocab_size:,}" if meta.error == "dense" else f"the {meta.top_k} likeliest other tokens"
    facts = [
        ("Pilot", meta.pilot),
        (
            "Rounds",
            f"{stats.first_round:,} to {stats.last_round:,}" + (f"; {missing:,} have no rows" if missing else ""),
        ),
        (
            "Examples",
            f"{stats.rows:,} rows of {len(stats.samples):,} samples, {stats.by_round.tokens.sum():,} target tokens",
        ),
        ("Errors kept", f"{kept}, besides the true one, for each target token"),
        ("Hidden states", f"{meta.tap}; {meta.rationale_layers} x {meta.rationale_dim} numbers a position"),
        ("Table", f"version {stats.version}, {stats.files:,} files, {stats.bytes:,} bytes"),
        ("Token texts", texts.note),
    ]
    if stats.dropped:
        facts.insert(
            3, ("Dropped", f"{stats.dropped:,} records were not written: the log could not be, or they were not finite")
        )
    if stats.not_finite:
        facts.insert(
            3, ("Left out", f"{stats.not_finite:,} rows hold numbers that are not finite, counted nowhere here")
        )
    if stats.bad_files:
        facts.insert(
            5, ("Not read", f"{len(stats.bad_files)} bad files, counted nowhere here: {', '.join(stats.bad_files[:5])}")
        )
    listed = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in facts)
    return (
        f"<h1>Mistake Log of {esc(meta.run)}</h1>"
        '<p class="lead">What the Pilot got wrong while it was trained, token by token.</p>'
        f'<dl class="facts">{listed}</dl>'
    )


def _tiles(stats: LogStats) -> str:
    first, last = stats.parts()

    def share(value: float | None) -> str:
        return "no data" if value is None else percent(value)

    def number(value: float | None) -> str:
        return "no data" if value is None else f"{value:.3f}"

    def right(line: dict[str, Any], key: str) -> float | None:
        return None if line[key] is None else 1.0 - line[key]

    spans = [f"{low}" if low == high else f"{low}-{high}" for low, high in (first["rounds"], last["rounds"])]
    when = f"rounds {spans[0]} → {spans[1]}"
    gap = stats.confidence.gap(0) if stats.confidence.tokens[0].any() else stats.confidence.gap(1)
    tiles = [
        (f"{number(first['loss'])} → {number(last['loss'])}", f"nats a target token, {when}"),
        (
            f"{share(right(first, 'wrong_share'))} → {share(right(last, 'wrong_share'))}",
            f"target tokens ranked first, {when}",
        ),
        (
            f"{share(right(first, 'rows_with_mistake_share'))} → {share(right(last, 'rows_with_mistake_share'))}",
            f"answers without a mistake, {when}",
        ),
        (
            "no data" if gap is None else f"{100 * gap:.1f} points",
            "mean gap between probability and accuracy, first sight",
        ),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{esc(value)}</b><span>{esc(name)}</span></div>' for value, name in tiles)
        + "</div>"
    )


def _rounds(stats: LogStats, charts: dict[str, Chart]) -> str:
    bins = stats.bins
    spans = [bins.span(i) for i in range(bins.count)]
    totals = stats.by_round.binned(bins.index(np.arange(stats.first_round, stats.last_round + 1)), bins.count)
    rows, tokens = Line("examples", totals.rows, "count"), Line("target tokens", totals.tokens, "count")
    starts = [
        (int(bins.index(np.array([stats.seen_from[seen]]))[0]), f"epoch {seen + 1}")
        for seen in range(1, stats.most_seen + 1, max(1, -(-stats.most_seen // MARKS)))
        if stats.seen_from[seen] >= 0
    ]
    loss = Line("loss", _mean(totals.loss, totals.tokens), "number")
    charts["loss"] = line_chart("loss", "Loss (nats a target token)", [loss], spans, extra=[rows, tokens], marks=starts)
    charts["accuracy"] = line_chart(
        "accuracy",
        "Accuracy",
        [
            Line("tokens\nranked first", 1.0 - _mean(totals.wrong, totals.tokens), "percent"),
            Line("answers with\nno mistake", 1.0 - _mean(totals.mistaken, totals.rows), "percent"),
        ],
        spans,
        extra=[rows, tokens],
        top=1.0,
        marks=starts,
    )
    joined = f" One point is {bins.width} rounds." if bins.width > 1 else ""
    note = (
        "As the Pilot met the examples, before it learned from them in that round; within the answer the true tokens so far "
        f"were given (teacher forcing).{joined}"
    )
    if starts:
        note += " Dotted lines: samples come back for another epoch."
    return (
        f"<h2>Loss and accuracy by round</h2><p>{note}</p>"
        f'<div class="two"><figure>{charts["loss"].svg}</figure><figure>{charts["accuracy"].svg}</figure></div>'
    )


def _positions(stats: LogStats, charts: dict[str, Chart]) -> str:
    found, used = stats.positions, stats.positions.used
    spans = [stats.bins.span(i) for i in range(stats.bins.count)]
    places = [
        f"token {i * found.width + 1}" if found.width == 1 else f"{i * found.width + 1}-{(i + 1) * found.width}"
        for i in range(used)
    ]
    tokens = found.tokens[:, :used]
    parts = []
    for name, title, sums, told, scale in (
        ("errors", "Mean error by place in the answer", found.error, "mean error", "mean error"),
        ("first", "Where answers first go wrong", found.first_wrong, "first mistake here", "share of answers"),
    ):
        values = _mean(sums[:, :used], tokens)
        high = _nice(float(np.nanmax(values)))
        charts[name] = heat_map(
            name,
            title,
            values,
            spans,
            places,
            high=high,
            name=told,
            tokens=tokens,
            counted="answers that reach it" if found.width == 1 else "target tokens",
        )
        ends = legend_html("0%", percent(high).replace(".0%", "%"), scale)
        parts.append(f'<figure><div class="wide">{charts[name].svg}</div>{ends}</figure>')
    joined = f" Each row is {found.width} tokens." if found.width > 1 else ""
    return (
        "<h2>Where an answer goes wrong</h2>"
        "<p>Across: rounds. Down: place in the answer, its first token on top. The upper map shows the mean error (the "
        "probability that was not on the true token); the lower one the share of answers, of those long enough, whose first "
        f"token not ranked first stands there.{joined}</p>" + "".join(parts)
    )


def _seen(stats: LogStats) -> str:
    seen = np.flatnonzero(stats.by_seen.rows)
    if len(seen) < 2:
        return ""
    shown = seen if len(seen) <= SEEN_ROWS else seen[np.linspace(0, len(seen) - 1, SEEN_ROWS).round().astype(int)]
    rows = []
    for times in shown:
        line = stats.by_seen.line([times])
        cells = [
            "first sight" if times == 0 else f"{times} time{'s' * bool(times > 1)}",
            f"{line['rows']:,}",
            f"{line['target_tokens']:,}",
            "-" if line["loss"] is None else f"{line['loss']:.4f}",
            "-" if line["error"] is None else percent(line["error"]),
            "-" if line["wrong_share"] is None else percent(line["wrong_share"]),
            percent(line["rows_with_mistake_share"] or 0.0),
        ]
        rows.append(cells)
    head = [
        "trained on before",
        "rows",
        "target tokens",
        "loss (nats)",
        "mean error",
        "tokens missed",
        "rows with a mistake",
    ]
    return (
        "<h2>How errors fall as samples repeat</h2><p>The first line is an honest error: the Pilot had never trained on the "
        "sample. Later ones are partly memory.</p>" + table_html(head, rows)
    )


def _calibration(stats: LogStats) -> str:
    found = stats.confidence
    groups, rows = [], []
    for group, name in enumerate(("first sight", "seen before")):
        gap, bias = found.gap(group), found.bias(group)
        if gap is None or bias is None:
            continue
        groups.append((name, found.tokens[group], found.probability[group], found.correct[group]))
        tokens = int(found.tokens[group].sum())
        accuracy = found.correct[group].sum() / tokens
        verdict = f"{'over' if bias > 0 else 'under'} by {100 * abs(bias):.1f} points"
        rows.append(
            [name, f"{tokens:,}", percent(accuracy + bias), percent(accuracy), verdict, f"{100 * gap:.1f} points"]
        )
    head = ["samples", "target tokens", "mean probability", "accuracy", "confidence", "mean gap (ECE)"]
    turned = [[name, *(row[i] for row in rows)] for i, name in enumerate(head) if i]
    return (
        "<h2>Calibration of the Pilot</h2><p>When the Pilot gives its first choice a probability, how often is it right? On "
        "the diagonal the two agree. Samples met for the first time are apart from those it had trained on. Point size grows "
        "with the number of tokens; the bars below count them.</p>"
        f'<div class="two"><figure>{reliability_chart(groups)}</figure>'
        f"<div>{table_html(['', *(row[0] for row in rows)], turned)}</div></div>"
    )


def _footer(stats: LogStats) -> str:
    return (
        "<footer><p><b>Words.</b> Round: one optimizer step of the Pilot. Error of a token: 1 minus the probability that the "
        "Pilot gave it. Loss: the negative logarithm of that probability, in nats. Ranked first: no other token had a larger "
        "probability. Place: counted from 1 at the first token of the answer.</p>"
        f"<p>Read from table version {stats.version} by tc-ray log report. This page loads nothing from anywhere.</p></footer>"
    )


def _mean(sums: Array, counts: Array) -> Array:
    """sums / counts, NaN without a count."""
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=np.asarray(counts) > 0)


def _nice(value: float) -> float:
    """The next round number at or above a share: the end of a colour scale."""
    return next((end for end in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if end >= value), 1.0)
