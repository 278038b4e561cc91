"""Statistics and coloured sequences on a terminal.

Invariant: what the colours say is also said in characters (a token not ranked first is followed by what was said instead, in
angle quotes), so that it reads in a pipe too. Called by `tc-ray log stats` and `tc-ray log show`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tc_ray.inspection.colours import level, scale
from tc_ray.inspection.sights import Sight, percent
from tc_ray.inspection.stats import LogStats
from tc_ray.inspection.tallies import Totals
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.text import visible

ROUND_LINES = 12
SEEN_LINES = 10
PIPE_WIDTH = 160


def stats_view(stats: LogStats, texts: TokenTexts, size: str, top: int) -> RenderableType:
    """Everything of `tc-ray log stats`.

    Args:
        size: of the data files, in words. top: tokens and samples listed.
    """
    meta = stats.metadata
    facts = Table.grid(padding=(0, 2))
    facts.add_row("run", f"{visible(meta.run)}, table version {stats.version}")
    facts.add_row("pilot", f"{visible(meta.pilot)}, {meta.vocab_size:,} tokens in its vocabulary")
    facts.add_row("size", f"{size} in {stats.files:,} files")
    if stats.bad_files:
        facts.add_row(
            "not read",
            f"{len(stats.bad_files)} bad files, not counted below: {visible(', '.join(stats.bad_files[:3]))}",
        )
    if stats.not_finite:
        facts.add_row("left out", f"{stats.not_finite:,} rows hold numbers that are not finite, not counted below")
    if stats.dropped:
        facts.add_row(
            "dropped", f"{stats.dropped:,} records were not written: the log could not be, or they were not finite"
        )
    if stats.rows == 0:
        facts.add_row("rows", "none")
        return facts
    whole = stats.by_round.line(slice(None))
    facts.add_row(
        "rows",
        f"{whole['rows']:,} of {len(stats.samples):,} samples; {whole['target_tokens']:,} target tokens",
    )
    rounds = f"{stats.first_round:,} to {stats.last_round:,}"
    missing = stats.last_round - stats.first_round + 1 - stats.rounds_with_rows
    facts.add_row("rounds", rounds + (f", {missing:,} of them without rows" if missing else ""))
    facts.add_row("tokens", visible(texts.note))
    views: list[RenderableType] = [facts, Text(), _rounds(stats), Text(), _seen(stats), Text()]
    views += [_calibration(stats), Text(), _missed(stats, texts, top), Text(), _hardest(stats, top)]
    return Group(*views)


def sample_view(sights: Sequence[Sight], texts: TokenTexts) -> RenderableType:
    """One sample: its prompt once, then its answer as the Pilot saw it in each of the rounds."""
    first = sights[0]
    prompt = Text(visible(texts.sequence(first.prompt.tolist())).rstrip("\n"), style="dim")
    views: list[RenderableType] = [Text(f"sample {first.sample_id}", style="bold"), prompt]
    for sight in sights:
        views += [Text(), Text(sight.headline(), style="bold"), answer(sight, texts)]
        views += [_wrong_tokens(sight, texts)] if len(sights) == 1 and sight.wrong else []
    return Group(*views)


def answer(sight: Sight, texts: TokenTexts) -> Text:
    """The true tokens, each on the colour of its error; after one that was not ranked first, what was."""
    colours = scale()
    line = Text()
    for place, token in enumerate(sight.truth):
        shade = level(float(sight.error[place]))
        text = texts.flowing(int(token)) if texts.known else texts.flowing(int(token)) + " "
        back, fore = colours[shade]
        style = f"{fore} on {back}" if shade else ""
        line.append(text.rstrip("\n"), style)
        if not sight.correct[place]:
            line.append(f"«{texts.quoted(sight.said(place))}»", "italic bold")
        line.append("\n" * (len(text) - len(text.rstrip("\n"))))
    line.rstrip()
    return line


def legend() -> Text:
    """The colour scale in one line."""
    line = Text("error 1 - p(true token): ")
    for shade, (back, fore) in enumerate(scale()):
        if shade and shade % 3 == 1:
            line.append(f" {shade * 5}% ", f"{fore} on {back}")
    return line.append("  «what was ranked first instead»", "italic bold")


def print_view(view: RenderableType, width: int | None = None) -> None:
    """Print to standard output; a pipe gets plain characters in lines as long as they need."""
    # no markup: token texts are full of brackets
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and width is None:
        console.width = PIPE_WIDTH
    console.print(view)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in columns:
        left = name.startswith("<")
        table.add_column(name.lstrip("<"), justify="left" if left else "right", header_style="dim", no_wrap=not left)
    return table


def _titled(title: str, table: Table, note: str = "") -> Group:
    # rich would fold a title of its own to the width of the table
    return Group(Text(title, style="bold"), table, *([Text(note, style="dim")] if note else []))


def _figures(totals: Totals, keys: object) -> list[str]:
    line = totals.line(keys)
    if not line["rows"]:
        return ["0", "-", "-", "-", "-"]
    loss, error, wrong = line["loss"], line["error"], line["wrong_share"]
    return [
        f"{line['rows']:,}",
        "-" if loss is None else f"{loss:.4f}",
        "-" if error is None else percent(error),
        "-" if wrong is None else percent(wrong),
        percent(line["rows_with_mistake_share"] or 0.0),
    ]


FIGURES = ("rows", "loss (nats)", "error", "tokens missed", "rows with a mistake")


def _rounds(stats: LogStats) -> Group:
    table = _table("rounds", *FIGURES)
    for part in np.array_split(np.arange(len(stats.by_round.rows)), ROUND_LINES):
        if len(part):
            low, high = stats.first_round + int(part[0]), stats.first_round + int(part[-1])
            table.add_row(f"{low}-{high}" if high > low else str(low), *_figures(stats.by_round, part))
    return _titled("Mistakes by round (loss and error a target token; error: 1 - p(true token))", table)


def _seen(stats: LogStats) -> Group:
    table = _table("trained on before", *FIGURES)
    seen = np.flatnonzero(stats.by_seen.rows)
    shown = seen if len(seen) <= SEEN_LINES else seen[np.linspace(0, len(seen) - 1, SEEN_LINES).round().astype(int)]
    for times in shown:
        table.add_row(f"{times} times" if times != 1 else "once", *_figures(stats.by_seen, [times]))
    note = "each sample was met once in these rounds" if stats.most_seen == 0 else ""
    return _titled("How errors fall as samples repeat", table, note)


def _calibration(stats: LogStats) -> Text:
    lines = []
    for group, name in enumerate(("first sight", "seen before")):
        gap, bias = stats.confidence.gap(group), stats.confidence.bias(group)
        if gap is not None and bias is not None:
            word = "over-confident" if bias > 0 else "under-confident"
            count = int(stats.confidence.tokens[group].sum())
            lines.append(
                f"{name}: off by {100 * gap:.1f} points, {word} by {100 * abs(bias):.1f} (n = {count:,} tokens)"
            )
    text = Text("Calibration of the Pilot (probability of its first choice against how often it was right)\n", "bold")
    return text.append("\n".join(lines), "not bold")


def _missed(stats: LogStats, texts: TokenTexts, top: int) -> Group:
    table = _table("<token", "missed", "of", "share", "<said instead (times)")
    for token in stats.missed(top):
        missed, true = int(stats.tokens.missed[token]), int(stats.tokens.true[token])
        instead = "  ".join(
            f"{texts.quoted(said)} ({times:,})" for said, times in stats.tokens.instead_of(int(token), 4)
        )
        table.add_row(Text(texts.quoted(int(token))), f"{missed:,}", f"{true:,}", percent(missed / true), Text(instead))
    short = stats.tokens.uncounted
    note = f"too many different pairs: each count may be short by up to {short:,}" if short else ""
    return _titled("Tokens most often missed", table, note)


def _hardest(stats: LogStats, top: int) -> Group:
    table = _table(
        *("sample", "loss (nats)", "times met", "missed", "of tokens", "first loss", "last loss", "last round"),
    )
    samples = stats.samples
    for i in stats.hardest(top):
        table.add_row(
            str(samples.ids[i]),
            f"{samples.mean_loss[i]:.3f}",
            *(f"{samples[name][i]:,}" for name in ("sights", "wrong", "tokens")),
            f"{samples['first_loss'][i]:.3f}",
            f"{samples['last_loss'][i]:.3f}",
            f"{samples['last_round'][i]:,}",
        )
    return _titled(
        "Hardest samples (mean loss a target token over all rounds they were met in)",
        table,
        "tc-ray log show LOG SAMPLE shows one of them, token by token",
    )


def _wrong_tokens(sight: Sight, texts: TokenTexts) -> Group:
    table = _table("place", "<true", "p(true)", "loss", "<said instead", "p", "<also likely")
    for place in np.flatnonzero(~sight.correct):
        others = [
            (texts.quoted(int(token)), percent(p))
            for token, p in zip(sight.others[place], sight.p_others[place], strict=True)
        ]
        also = "  ".join(f"{text} {p}" for text, p in others[1:] if text != "?")
        table.add_row(
            str(place + 1),
            Text(texts.quoted(int(sight.truth[place]))),
            percent(sight.p_true(int(place))),
            f"{float(sight.loss[place]):.2f}",
            Text(others[0][0]),
            others[0][1],
            Text(also),
        )
    return _titled("\nTokens not ranked first", table)
