"""Samples as a page: `tc-ray log show --html`, and the same blocks inside the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tc_ray.inspection.page import answer_html, esc, legend_html, page, prompt_html
from tc_ray.inspection.sights import Sight, thinned
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.rows.schema import LogMetadata

READING = (
    "Each token of the true answer stands on the colour of its error. A token that was not ranked first is underlined and "
    "followed by what was ranked first instead, «so». Point at a token for its probabilities."
)


def sample_page(metadata: LogMetadata, samples: Mapping[int, Sequence[Sight]], texts: TokenTexts) -> str:
    """A page with all sights of some samples, in full."""
    blocks = [sample_block(sights, texts) for sights in samples.values() if sights]
    name = f"sample {next(iter(samples))}" if len(samples) == 1 else f"{len(samples)} hardest samples"
    head = f"<h1>Run {esc(metadata.run)}: {esc(name)}</h1>"
    facts = f'<p class="lead">Pilot {esc(metadata.pilot)}; {esc(texts.note)}.</p><p>{esc(READING)}</p>'
    return page(f"{metadata.run}: {name}", "\n".join([head, facts, legend_html(), *blocks]))


def sample_block(
    sights: Sequence[Sight],
    texts: TokenTexts,
    *,
    badge: str = "",
    most_sights: int | None = None,
    most_tokens: int | None = None,
    most_prompt: int | None = None,
) -> str:
    """One sample: its prompt, and a line for each time it was met.

    Args:
        badge: a word on what the sample shows. most_sights: lines shown, evenly spread. most_tokens: answer tokens shown.
        most_prompt: characters of the prompt shown.
    """
    shown = list(sights) if most_sights is None else thinned(sights, most_sights)
    lines = []
    for sight in shown:
        before = "first sight" if sight.seen == 0 else f"{sight.seen} time{'s' * (sight.seen > 1)} before"
        told = f"loss {sight.mean_loss:.3f}, {sight.wrong} of {len(sight.truth)} missed"
        note = f'<p class="note"><b>round {sight.round:,}</b> {before}</p><p class="note">{told}</p>'
        lines.append(f'<div class="sight">{note}{answer_html(sight, texts, most_tokens)}</div>')
    mark = f'<span class="badge">{esc(badge)}</span>' if badge else ""
    left = len(sights) - len(shown)
    more = f'<p class="note">{left} of {len(sights)} rounds are left out.</p>' if left else ""
    return (
        f'<section class="sample"><h3>{mark}sample {sights[0].sample_id}</h3>'
        f"{prompt_html(sights[0], texts, most_prompt)}{''.join(lines)}{more}</section>"
    )
