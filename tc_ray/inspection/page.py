"""Self-contained pages, rendered from the templates in `static/`. `sample_page` is `tc-ray log show --html`.

Invariant: a page runs no script and asks the network for nothing (its own security policy forbids both). The templates escape
every text (Jinja's autoescape), and `visible` shows what does not print. The report is built from the same parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tc_ray import __version__
from tc_ray.inspection.colours import scale
from tc_ray.inspection.samples import Visit, thinned
from tc_ray.inspection.tokens import TokenTexts
from tc_ray.mistakelog.rows.schema import LogMetadata
from tc_ray.text import visible

VISITS, TOKENS, PROMPT = 12, 160, 1200


def render(template: str, **values: Any) -> str:
    """A whole HTML document from a template in `static/`; `Markup` values are HTML, all others text."""
    colours = {"light": scale(), "dark": scale(dark=True)}
    return _templates().get_template(template).render(version=__version__, **colours, **values)


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("tc_ray.inspection", "static"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )


def sample_page(metadata: LogMetadata, samples: Mapping[int, Sequence[Visit]], texts: TokenTexts) -> str:
    """A page with all visits to some samples, in full."""
    name = f"sample {next(iter(samples))}" if len(samples) == 1 else f"{len(samples)} hardest samples"
    blocks = [sample(visits, texts) for visits in samples.values() if visits]
    title = f"Run {metadata.run}: {name}"
    return render("samples.html", title=title, pilot=metadata.pilot, samples=blocks, texts=texts)


def sample(visits: Sequence[Visit], texts: TokenTexts, *, badge: str = "", short: bool = False) -> dict[str, Any]:
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
