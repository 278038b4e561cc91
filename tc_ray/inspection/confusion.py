"""Which tokens are confused: the part of the report with truth against what was said, as a table with numbers."""

from __future__ import annotations

from tc_ray.inspection.colours import level
from tc_ray.inspection.page import esc, table_html
from tc_ray.inspection.sights import percent
from tc_ray.inspection.stats import LogStats
from tc_ray.inspection.tokens import TokenTexts

MATRIX = 14
PAIRS = 30


def confusion_html(stats: LogStats, texts: TokenTexts) -> str:
    """Section of the report: a matrix of the tokens most often missed, and the most frequent pairs."""

    def tok(token: int) -> str:
        return f'<span class="tok">{esc(texts.quoted(token))}</span>'

    truths = [int(token) for token in stats.missed(MATRIX)]
    heading = "<h2>Which tokens are confused</h2>"
    if not truths:
        return heading + "<p>Every target token was ranked first.</p>"
    instead = {truth: dict(stats.tokens.instead_of(truth, 10_000)) for truth in truths}
    total: dict[int, int] = {}
    for said_instead in instead.values():
        for said, times in said_instead.items():
            total[said] = total.get(said, 0) + times
    columns = sorted(total, key=lambda said: (-total[said], said))[:MATRIX]
    rows = []
    for truth in truths:
        missed, true = int(stats.tokens.missed[truth]), int(stats.tokens.true[truth])
        counts = [instead[truth].get(said, 0) for said in columns]
        cells = [
            f'<td class="cell {f"e{level(times / missed)}" if times else "none"}">{times:,}</td>'
            for times in (*counts, missed - sum(counts))
        ]
        rows.append(
            f"<tr><td>{tok(truth)}</td>{''.join(cells)}<td>{missed:,} of {true:,}</td><td>{percent(missed / true)}</td></tr>"
        )
    names = "".join(f"<th>{tok(said)}</th>" for said in columns)
    matrix = (
        '<div class="scroll"><table class="matrix"><thead><tr><th>true token ↓ &nbsp; said instead →</th>'
        f'{names}<th class="flat">others</th><th class="flat">missed</th><th class="flat">share</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    listed = [
        [tok(truth), tok(said), f"{times:,}", percent(times / stats.tokens.true[truth])]
        for truth, said, times in stats.tokens.pairs(PAIRS)
    ]
    pairs = table_html(["true token", "said instead", "times", "of all times it was true"], listed, left=2)
    short = (
        f" There were too many different pairs to keep: each count may be short by up to {stats.tokens.uncounted:,}."
        if stats.tokens.uncounted
        else ""
    )
    return (
        f"{heading}<p>Rows: the {len(truths)} tokens most often not ranked first. Columns: what was ranked first instead. Numbers "
        f"are target tokens over all rounds; the colour is the share of the row.{short} ␣ is a blank, ↵ a line end.</p>"
        f"{matrix}<details><summary>The {len(listed)} most frequent pairs</summary>{pairs}</details>"
    )
