"""The shell of a self-contained page: style, script and the parts that all pages share.

Invariant: a page asks the network for nothing (its own security policy forbids it), runs no script but the one written here,
and every text from a log or a config passes `esc`, or `script_json` inside a script element. Used by the report and by
`tc-ray log show --html`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from tc_ray import __version__
from tc_ray.inspection.colours import LEVELS, level, scale
from tc_ray.inspection.page_script import SCRIPT
from tc_ray.inspection.page_style import STYLE
from tc_ray.inspection.sights import Sight
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.text import visible


def esc(text: object) -> str:
    """Text for the inside of an element or of a quoted attribute; characters that do not print are shown as escapes."""
    return escape(visible(str(text)), quote=True)


def script_json(document: Any) -> str:
    """JSON that may stand inside a script element, whatever its texts are."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(title: str, body: str, charts: dict[str, Any] | None = None) -> str:
    """A whole HTML document.

    Args:
        body: HTML.
        charts: what the script tells of a chart under the pointer, by the chart's id (see `charts`).
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="tc-ray {esc(__version__)}">
<title>{esc(title)}</title>
<style>{STYLE}{_scale_style()}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="charts">{script_json(charts or {})}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def answer_html(sight: Sight, texts: TokenTexts, most: int | None = None) -> str:
    """The true tokens of a sight, each on the colour of its error; after one not ranked first, what was.

    Args:
        most: target tokens shown; None: all.
    """
    count = len(sight.truth) if most is None else min(most, len(sight.truth))
    parts = []
    for place in range(count):
        text = texts.flowing(int(sight.truth[place])) + ("" if texts.known else " ")
        mark = "" if sight.correct[place] else " w"
        parts.append(
            f'<span class="t e{level(float(sight.error[place]))}{mark}" title="{esc(sight.describe(place, texts))}">'
            f"{esc(text) or '&#8203;'}</span>"
        )
        if mark:
            parts.append(f'<i class="s">{esc(texts.quoted(sight.said(place)))}</i>')
    left = len(sight.truth) - count
    if left:
        parts.append(f'<span class="note"> … {left:,} more tokens</span>')
    return f'<p class="answer">{"".join(parts)}</p>'


def prompt_html(sight: Sight, texts: TokenTexts, most: int | None = None) -> str:
    """The prompt of a sight; `most`: characters shown, from its end."""
    text = texts.sequence(sight.prompt.tolist()).strip("\n")
    cut = "" if most is None or len(text) <= most else f"… ({len(text) - most:,} characters before) "
    return f'<p class="prompt">{esc(cut + (text[-most:] if cut and most else text))}</p>'


def legend_html(low: str = "0", high: str = "1", name: str = "error = 1 - p(true token)") -> str:
    """The colour scale with its ends."""
    cells = "".join(f'<span class="e{shade}"></span>' for shade in range(LEVELS))
    return f'<p class="legend"><span>{esc(name)}</span> {esc(low)} <span class="ramp">{cells}</span> {esc(high)}</p>'


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", left: int = 1) -> str:
    """A table of cells that are HTML already; the first `left` columns are texts, the others numbers."""
    top = "".join(f"<th{'' if i < left else ' class=n'}>{esc(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{'' if i < left else ' class=n'}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _scale_style() -> str:
    """Classes e0..e19, as background of tokens and as fill of charts, for light and dark pages."""

    def rules(dark: bool) -> str:
        lines = []
        for shade, (back, fore) in enumerate(scale(dark)):
            lines.append(
                f".ramp .e{shade},.cell.e{shade}{{background:{back};color:{fore}}}path.e{shade}{{fill:{back}}}"
            )
            if shade:
                lines.append(f".t.e{shade}{{background:{back};color:{fore}}}")
        return "".join(lines)

    return f"{rules(False)}@media (prefers-color-scheme:dark){{{rules(True)}}}"
