"""The pages: the report on a log, and `tc-ray log show --html`. Rendered from the templates in `static/`.

Invariant: a page runs no script and asks the network for nothing (its own security policy forbids both). The templates escape
every text (Jinja's autoescape), and `visible` shows what does not print. The report's size is bounded, whatever the log's:
rounds are joined into at most MAX_BINS columns, positions into at most 32, and a bounded number of samples is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tc_ray import __version__
from tc_ray.inspection import tables
from tc_ray.inspection.charts import heat_map, line_chart, reliability_chart, scale
from tc_ray.inspection.samples import Visit, across_epochs, find_visits, percent, thinned
from tc_ray.inspection.stats import MAX_BINS, VISITED, LogStats, collect
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.rows.ragged import Array
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.text import visible

WORST = 12
ACROSS_EACH = 4
MISSED = 30
VISITS, TOKENS, PROMPT = 12, 160, 1200


def report_page(log: MistakeLog, texts: TokenTexts, rounds: tuple[int, int] | None = None) -> str:
    """The report as HTML; `rounds`: first and last one, both included; None: all.

    Raises ValueError: the log has no target token (in these rounds).
    """
    stats = collect(log, rounds)
    if len(stats.samples) == 0:
        left_out = f"; {stats.not_finite} rows hold numbers that are not finite" if stats.not_finite else ""
        raise ValueError(f"the log of run {stats.metadata.run} has no target token to report on yet{left_out}")
    across = across_epochs(stats.samples, ACROSS_EACH)
    hardest = {row.sample_id: f"mean loss {row.mean_loss:.3f}, rounds: {row.visits}" for row in stats.hardest(WORST)}
    visits = find_visits(log, [*(id for _, id in across), *hardest], rounds)
    errors = stats.positions.means()
    high = next((end for end in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8) if end >= np.nanmax(errors)), 1.0)
    return render(
        "report.html",
        title=f"Mistake Log of {stats.metadata.run}",
        stats=stats,
        texts=texts,
        facts=tables.facts(stats, texts),
        tiles=_tiles(stats),
        lines=_lines(stats),
        errors=heat_map(
            "Mean error by place in the answer", errors, stats.spans, width=stats.positions.width, high=high
        ),
        high=f"{high:.0%}",
        reliability=reliability_chart(stats.confidence, VISITED),
        by_round=tables.by_round(stats, MAX_BINS),
        by_seen=tables.by_seen(stats),
        missed=tables.missed_tokens(stats, texts, MISSED),
        calibration=tables.calibration(stats),
        across=[_sample(visits[id], texts, badge=label, short=True) for label, id in across],
        hardest=[_sample(visits[id][-1:], texts, badge=badge, short=True) for id, badge in hardest.items()],
    )


def sample_page(metadata: LogMetadata, samples: Mapping[int, Sequence[Visit]], texts: TokenTexts) -> str:
    """A page with all visits to some samples, in full."""
    name = f"sample {next(iter(samples))}" if len(samples) == 1 else f"{len(samples)} hardest samples"
    blocks = [_sample(visits, texts) for visits in samples.values() if visits]
    title = f"Run {metadata.run}: {name}"
    return render("samples.html", title=title, pilot=metadata.pilot, samples=blocks, texts=texts)


def render(template: str, *, package: str = "tc_ray.inspection", **values: Any) -> str:
    """A whole HTML document from a template in a package's `static/`; `Markup` values are HTML, all others text."""
    colours = {"light": scale(), "dark": scale(dark=True)}
    return _templates(package).get_template(template).render(version=__version__, **colours, **values)


@cache
def _templates(package: str) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(name, "static") for name in (package, "tc_ray.inspection")]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _sample(visits: Sequence[Visit], texts: TokenTexts, *, badge: str = "", short: bool = False) -> dict[str, Any]:
    """One sample for the templates: its prompt, and a line for each visit.

    Args:
        badge: a word on what the sample shows. short: at most VISITS lines of at most TOKENS answer tokens, and the last
            PROMPT characters of the prompt.
    """
    prompt = texts.sequence(visits[0].prompt.tolist()).strip("\n")
    shown = thinned(visits, VISITS) if short else visits
    return {
        "id": visits[0].sample_id,
        "badge": badge,
        "prompt": prompt[-PROMPT:] if short else prompt,
        "cut": max(0, len(prompt) - PROMPT) if short else 0,
        "visits": shown,
        "most": TOKENS if short else max(len(visit.truth) for visit in shown),
        "left_out": len(visits) - len(shown),
    }


def _tiles(stats: LogStats) -> list[tuple[str, str]]:
    """(value, name) of the numbers on top: first and last span of rounds with rows."""
    lines = [line for line in stats.over(stats.spans) if line["target_tokens"]]
    first, last = lines[0], lines[-1]
    missed, mistaken = (
        f"{percent(1 - first[name])} → {percent(1 - last[name])}" for name in ("wrong_share", "rows_with_mistake_share")
    )
    return [
        (f"{first['loss']:.3f} → {last['loss']:.3f}", "nats per target token, from the first rounds to the last"),
        (missed, "target tokens ranked first"),
        (mistaken, "answers without a mistake"),
    ]


def _lines(stats: LogStats) -> list[Markup]:
    lines = stats.over(stats.spans)

    def curve(name: str) -> Array:
        return np.array([np.nan if line[name] is None else line[name] for line in lines])

    loss = [("loss", curve("loss"))]
    accuracy = [
        ("tokens ranked first", 1.0 - curve("wrong_share")),
        ("answers without a mistake", 1.0 - curve("rows_with_mistake_share")),
    ]
    return [
        line_chart("Loss (nats per target token)", loss, stats.spans),
        line_chart("Accuracy", accuracy, stats.spans, percent=True),
    ]
