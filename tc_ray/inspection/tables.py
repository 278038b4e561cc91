"""The statistics as tables of text, which the terminal and the report both show.

Invariant: cells are raw text; whoever prints them escapes them for the place they are put in (`report.render`, `text.visible`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tc_ray.inspection.samples import percent, thinned
from tc_ray.inspection.stats import VISITED, LogStats, round_spans
from tc_ray.inspection.tokens import TokenTexts

SEEN_LINES = 16
_MEANS = ("rows", "target tokens", "loss (nats)", "error", "tokens missed", "rows with a mistake")


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; `texts`: columns that are text and not numbers."""

    title: str
    head: Sequence[str]
    rows: list[list[str]]
    texts: tuple[int, ...] = (0,)


def facts(stats: LogStats, texts: TokenTexts) -> list[tuple[str, str]]:
    """What the log is: (name, value)."""
    meta = stats.metadata
    kept = f"all {meta.vocab_size:,}" if meta.error == "dense" else f"the {meta.top_k} likeliest other tokens"
    rows = f"{stats.rows:,} rows of {len(stats.samples):,} samples, {int(stats.by_round.tokens.sum()):,} target tokens"
    optional = [
        (len(stats.bad_files), "not read", f" bad files, not counted here: {', '.join(stats.bad_files[:5])}"),
        (stats.not_finite, "left out", " rows hold numbers that are not finite, not counted here"),
        (stats.dropped, "dropped", " records were not written: the log was full, or they were not finite"),
    ]
    return [
        ("run", meta.run),
        ("pilot", f"{meta.pilot}, {meta.vocab_size:,} tokens in its vocabulary"),
        ("table", f"version {stats.version}, {stats.files:,} files, {stats.bytes:,} bytes"),
        *((name, f"{count:,}{text}") for count, name, text in optional if count),
        ("examples", rows if stats.rows else "none"),
        ("rounds", f"{stats.first_round:,} to {stats.last_round:,}"),
        ("errors kept", f"{kept}, besides the true one, for each target token"),
        (
            "hidden states",
            f"{meta.tap}; {meta.rationale_layers} x {meta.rationale_dim} {meta.rationale_dtype} numbers per position",
        ),
        ("token texts", texts.note),
    ]


def by_round(stats: LogStats, most: int) -> Table:
    """Means over at most `most` spans of rounds."""
    spans = round_spans(stats.first_round, stats.last_round, most)
    names = [f"{low}-{high}" if high > low else str(low) for low, high in spans]
    rows = [[name, *_means(line)] for name, line in zip(names, stats.over(spans), strict=True)]
    title = "Mistakes by round (loss and error per target token; error: 1 - p(true token))"
    return Table(title, ("rounds", *_MEANS), rows)


def by_seen(stats: LogStats) -> Table:
    """Means over samples that the Pilot had trained on equally often before."""
    seen = thinned(np.flatnonzero(stats.by_seen.rows).tolist(), SEEN_LINES)
    names = {0: "first visit", 1: "once"}
    rows = [[names.get(times, f"{times} times"), *_means(stats.by_seen.line([times]))] for times in seen]
    return Table("How errors fall as samples repeat", ("trained on before", *_MEANS), rows)


def calibration(stats: LogStats) -> Table:
    """Probability of the Pilot's first choice against how often it was right."""
    rows = []
    for group, name in enumerate(VISITED):
        if found := stats.confidence.summary(group):
            accuracy, bias = found["accuracy"], found["bias"]
            verdict = f"{'over' if bias > 0 else 'under'} by {100 * abs(bias):.1f} points"
            line = [f"{found['tokens']:,}", percent(accuracy + bias), percent(accuracy), verdict]
            rows.append([name, *line, f"{100 * found['gap']:.1f} points"])
    head = ("samples", "target tokens", "mean probability", "accuracy", "confidence", "mean gap (ECE)")
    return Table("Calibration of the Pilot (its first choice)", head, rows)


def missed_tokens(stats: LogStats, texts: TokenTexts, top: int) -> Table:
    """Tokens most often not ranked first, and what was predicted instead."""
    rows = []
    for token in stats.missed(top).tolist():
        missed, true = int(stats.tokens.missed[token]), int(stats.tokens.true[token])
        instead = "  ".join(f"{texts.quoted(t)} ({times:,})" for t, times in stats.tokens.instead_of(token, 4))
        rows.append([texts.quoted(token), f"{missed:,}", f"{true:,}", percent(missed / true), instead])
    head = ("token", "missed", "of", "share", "predicted instead (times)")
    return Table("Tokens most often missed", head, rows, texts=(0, 4))


def hardest_samples(stats: LogStats, top: int) -> Table:
    """Samples of the largest mean loss over all visits."""
    head = ("sample", "loss (nats)", "visits", "missed", "of tokens", "first loss", "last loss", "last round")
    names = ["sample_id", "mean_loss", "visits", "wrong", "tokens", "first_loss", "last_loss", "last_round"]
    rows = [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in line]
        for line in stats.hardest(top)[names].tolist()
    ]
    return Table("Hardest samples (mean loss per target token over all visits)", head, rows, texts=())


def _means(line: dict[str, Any]) -> list[str]:
    shares = [line[name] for name in ("error", "wrong_share", "rows_with_mistake_share")]
    return [
        f"{line['rows']:,}",
        f"{line['target_tokens']:,}",
        "-" if line["loss"] is None else f"{line['loss']:.4f}",
        *("-" if share is None else percent(share) for share in shares),
    ]
