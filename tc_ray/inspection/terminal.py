"""Statistics and coloured samples on a terminal.

Invariant: what the colours show is also shown in characters (after a token that was not ranked first stands the one that
was, in angle quotes), so it reads in a pipe too. Called by `tc-ray log stats` and `tc-ray log show`.
"""

from __future__ import annotations

from collections.abc import Sequence

import rich.table
from rich.console import Console, Group, RenderableType
from rich.text import Text

from tc_ray.inspection import tables
from tc_ray.inspection.charts import scale
from tc_ray.inspection.samples import Visit
from tc_ray.inspection.stats import LogStats
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.text import visible

ROUND_LINES = 12
PIPE_WIDTH = 160


def stats_view(stats: LogStats, texts: TokenTexts, top: int) -> RenderableType:
    """Everything of `tc-ray log stats`; `top`: tokens and samples listed."""
    facts = rich.table.Table.grid(padding=(0, 2))
    for name, value in tables.facts(stats, texts):
        facts.add_row(name, visible(value))
    if not stats.rows:
        return facts
    shown = [
        tables.by_round(stats, ROUND_LINES),
        tables.by_seen(stats),
        tables.calibration(stats),
        tables.missed_tokens(stats, texts, top),
        tables.hardest_samples(stats, top),
    ]
    return Group(facts, *map(table_view, shown))


def table_view(table: tables.Table) -> Group:
    """A table under its title."""
    view = rich.table.Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for place, name in enumerate(table.head):
        text = place in table.texts
        view.add_column(name, justify="left" if text else "right", header_style="dim", no_wrap=not text)
    for row in table.rows:
        view.add_row(*map(Text, row))
    # the title apart: rich would fold a title of its own to the width of the table
    return Group(Text(f"\n{table.title}", style="bold"), view)


def sample_view(visits: Sequence[Visit], texts: TokenTexts) -> RenderableType:
    """One sample: its prompt once, then its answer as the Pilot saw it in each of the rounds, each token on the colour of its
    error.
    """
    first, colours = visits[0], scale()
    prompt = Text(visible(texts.sequence(first.prompt.tolist())).rstrip("\n"), style="dim")
    views: list[RenderableType] = [Text(f"sample {first.sample_id}", style="bold"), prompt]
    for visit in visits:
        views.append(Text(f"\nround {visit.round}, {visit.result}", style="bold"))
        line = Text()
        for text, shade, instead, _ in visit.tokens(texts):
            back, fore = colours[shade]
            line.append(text.rstrip("\n"), f"{fore} on {back}" if shade else "")
            if instead is not None:
                line.append(f"«{instead}»", "italic bold")
            line.append("\n" * text.endswith("\n"))
        line.rstrip()
        views.append(line)
    return Group(*views)


def legend() -> Text:
    """The colour scale in one line."""
    line = Text("error 1 - p(true token): ")
    for shade, (back, fore) in enumerate(scale()):
        if shade and shade % 3 == 1:
            line.append(f" {shade * 5}% ", f"{fore} on {back}")
    return line.append("  «what was ranked first instead»", "italic bold")


def print_view(view: RenderableType) -> None:
    """Print to standard output; a pipe gets plain characters in lines as long as they need."""
    # no markup: token texts are full of brackets
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(view)
