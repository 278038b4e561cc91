"""Self-contained pages: the shell, and how samples and tables look in it. `sample_page` is `tc-ray log show --html`.

Invariant: a page runs no script and asks the network for nothing (its own security policy forbids both), and every text from
a log or a config passes `esc`. The report is built from the same parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from tc_ray import __version__
from tc_ray.inspection.colours import LEVELS, level, scale
from tc_ray.inspection.samples import Visit, thinned
from tc_ray.inspection.tables import Table
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.text import visible

READING = (
    "Each token of the true answer stands on the colour of its error. A token that was not ranked first is underlined and "
    "followed by the one that was, «so». Point at a token to see its probabilities."
)
VISITS, TOKENS, PROMPT = 12, 160, 1200
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def esc(text: object) -> str:
    """Text for the inside of an element or of a quoted attribute; characters that do not print are shown as escapes."""
    return escape(visible(str(text)), quote=True)


def page(title: str, body: str) -> str:
    """A whole HTML document; `body` is HTML."""
    style = files(__package__).joinpath("static", "page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="tc-ray {esc(__version__)}">
<title>{esc(title)}</title>
<style>{_scale_style()}
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def sample_page(metadata: LogMetadata, samples: Mapping[int, Sequence[Visit]], texts: TokenTexts) -> str:
    """A page with all visits to some samples, in full."""
    blocks = [sample_html(visits, texts) for visits in samples.values() if visits]
    name = f"sample {next(iter(samples))}" if len(samples) == 1 else f"{len(samples)} hardest samples"
    head = f"<h1>Run {esc(metadata.run)}: {esc(name)}</h1>"
    facts = f'<p class="lead">Pilot {esc(metadata.pilot)}; {esc(texts.note)}.</p><p>{esc(READING)}</p>'
    return page(f"{metadata.run}: {name}", "\n".join([head, facts, legend_html(), *blocks]))


def sample_html(visits: Sequence[Visit], texts: TokenTexts, *, badge: str = "", short: bool = False) -> str:
    """One sample: its prompt, and a line for each visit.

    Args:
        badge: a word on what the sample shows. short: at most VISITS lines of at most TOKENS answer tokens, and the last
            PROMPT characters of the prompt.
    """
    shown = thinned(visits, VISITS) if short else visits
    lines = [
        f'<div class="visit"><p class="note"><b>round {visit.round:,}</b> {visit.when}</p><p class="note">{visit.result}</p>'
        f"{_answer(visit, texts, TOKENS if short else len(visit.truth))}</div>"
        for visit in shown
    ]
    mark = f'<span class="badge">{esc(badge)}</span>' if badge else ""
    left = len(visits) - len(shown)
    more = f'<p class="note">{left} of {len(visits)} rounds are left out.</p>' if left else ""
    prompt = texts.sequence(visits[0].prompt.tolist()).strip("\n")
    if short and len(prompt) > PROMPT:
        prompt = f"… ({len(prompt) - PROMPT:,} characters before) {prompt[-PROMPT:]}"
    return (
        f'<section class="sample"><h3>{mark}sample {visits[0].sample_id}</h3>'
        f'<p class="prompt">{esc(prompt)}</p>{"".join(lines)}{more}</section>'
    )


def _answer(visit: Visit, texts: TokenTexts, most: int) -> str:
    """The true tokens, each on the colour of its error; after one that was not ranked first, the one that was."""
    count = min(most, len(visit.truth))
    parts = []
    for place in range(count):
        text = texts.flowing(int(visit.truth[place])) + ("" if texts.known else " ")
        mark = "" if visit.correct[place] else " w"
        shade = level(float(visit.error[place]))
        colour = f" e{shade}" if shade else ""
        parts.append(
            f'<span class="t{colour}{mark}" title="{esc(visit.describe(place, texts))}">{esc(text) or "&#8203;"}</span>'
        )
        if mark:
            parts.append(f'<i class="s">{esc(texts.quoted(visit.predicted(place)))}</i>')
    left = len(visit.truth) - count
    more = f'<span class="note"> … {left:,} more tokens</span>' if left else ""
    return f'<p class="answer">{"".join(parts)}{more}</p>'


def legend_html(low: str = "0", high: str = "1", name: str = "error = 1 - p(true token)") -> str:
    """The colour scale with its ends."""
    cells = "".join(f'<span class="e{shade}"></span>' for shade in range(LEVELS))
    return f'<p class="legend"><span>{esc(name)}</span> {esc(low)} <span class="ramp">{cells}</span> {esc(high)}</p>'


def table_html(table: Table) -> str:
    """A table without its title."""
    kinds = ["" if place in table.texts else ' class="n"' for place in range(len(table.head))]

    def line(cells: Sequence[str], tag: str) -> str:
        cells_html = [f"<{tag}{kind}>{esc(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
        return f"<tr>{''.join(cells_html)}</tr>"

    body = "".join(line(row, "td") for row in table.rows)
    note = f'<p class="note">{esc(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table><thead>{line(table.head, "th")}</thead><tbody>{body}</tbody></table></div>{note}'
    )


def _scale_style() -> str:
    """The colours of the levels as variables, for light and dark pages, and a class for each."""

    def variables(dark: bool) -> str:
        pairs = [f"--e{shade}:{back};--f{shade}:{fore};" for shade, (back, fore) in enumerate(scale(dark))]
        return f":root{{{''.join(pairs)}}}"

    classes = [f".e{shade}{{background:var(--e{shade});color:var(--f{shade})}}" for shade in range(LEVELS)]
    dark = f"@media screen and (prefers-color-scheme:dark){{{variables(True)}}}"
    return variables(False) + dark + "".join(classes)
