"""Pages, terminal views and charts of a log: whole, self-contained, bounded, and safe whatever the text of a token is."""

from __future__ import annotations

import io
import itertools
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tc_ray.inspection.charts import LEVELS, heat_map, level, line_chart, scale
from tc_ray.inspection.report import report_page, sample_page
from tc_ray.inspection.samples import find_visits, visits_of
from tc_ray.inspection.stats import collect
from tc_ray.inspection.terminal import legend, sample_view, stats_view
from tc_ray.inspection.tokens import TokenizerError, TokenTexts, find_tokenizer
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.models.identity import tokenizer_hash
from tc_ray.text import visible
from tests.support.colours import contrast, luminance
from tests.support.inspection_samples import make_examples, make_log
from tests.support.mistakelog_samples import metadata
from tests.support.tiny_model import make_tokenizer

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Checker(HTMLParser):
    """Collects elements and attributes, and notes tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


class Evil(TokenTexts):
    """Texts that try to break out of wherever they are put."""

    def __init__(self) -> None:
        super().__init__(None, "</script><script>alert(1)</script>")
        self.known = True

    def raw(self, token: int) -> str:
        texts = [
            "</script><script>alert(1)</script>",
            '"onmouseover="alert(1)',
            "\x1b[31m\u202e",
            "<img src=x>",
            "&amp;",
            "[/bold]",
        ]
        return texts[token % len(texts)]

    def sequence(self, tokens: object) -> str:
        return "".join(self.raw(int(t)) for t in tokens)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> MistakeLog:
    return MistakeLog(make_log(tmp_path_factory.mktemp("log"), make_examples(samples=12, epochs=3)))


@pytest.fixture(scope="module")
def report(log: MistakeLog) -> str:
    return report_page(log, TokenTexts(None, "ids"))


def assert_sound(text: str) -> Checker:
    """The page closes what it opens, and asks the network for nothing."""
    found = Checker(text)
    assert not found.wrong and not found.open
    for tag, attributes in found.tags:
        assert not {"src", "href", "srcset"} & set(attributes), (tag, attributes)
        assert (attributes.get("xlink:href") or "#").startswith("#"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not any(tag == "script" for tag, _ in found.tags)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    return found


def test_the_report_is_whole_and_self_contained(report: str) -> None:
    found = assert_sound(report)
    for heading in (
        "Loss and accuracy by round",
        "Where an answer goes wrong",
        "How errors fall",
        "Which tokens are confused",
        "Calibration of the Pilot",
        "The same sample across epochs",
        "Hardest samples",
    ):
        assert f">{heading}" in report
    assert sum(tag == "svg" for tag, _ in found.tags) == 4
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "charts share no ids"


def test_the_numbers_in_the_report_are_the_logs(log: MistakeLog, report: str) -> None:
    totals = collect(log).by_round
    table = report[report.index("<summary>Mistakes by round") :]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table[: table.index("</table>")])
    lines = [cells[i : i + 7] for i in range(0, len(cells), 7)]
    assert [line[:3] for line in lines] == [
        [str(round_ + 1), f"{totals.rows[round_]}", f"{totals.tokens[round_]:.0f}"]
        for round_ in range(len(totals.rows))
    ]
    assert [float(line[3]) for line in lines] == pytest.approx(list(totals.loss / totals.tokens), abs=1e-4)


@pytest.mark.parametrize("kind", ["report", "sample"])
def test_token_texts_cannot_break_out(log: MistakeLog, kind: str) -> None:
    evil = Evil()
    text = report_page(log, evil) if kind == "report" else sample_page(log.metadata, find_visits(log, [0, 1]), evil)
    assert_sound(text)
    assert "<img" not in text and "\x1b" not in text and "\u202e" not in text
    assert "&lt;/script&gt;&lt;script&gt;" in text and "\\x1b[31m\\u202e" in text


def test_terminal_views_cannot_be_broken_out_of(log: MistakeLog) -> None:
    out = io.StringIO()
    console = Console(file=out, width=200, markup=False, emoji=False, highlight=False, force_terminal=False)
    console.print(stats_view(collect(log), Evil(), 50))
    console.print(sample_view(visits_of(log, 0), Evil()))
    assert "\x1b" not in out.getvalue() and "[/bold]" in out.getvalue() and "\\x1b[31m" in out.getvalue()


def test_a_big_log_gives_a_bounded_page(tmp_path: Path) -> None:
    examples = make_examples(samples=200, epochs=2, batch=1, longest=90, vocab=12)
    log = MistakeLog(make_log(tmp_path / "log", examples, rounds_a_file=200))
    text = report_page(log, TokenTexts(None, "ids"))
    assert "One point is 4 rounds" in text and "Each row is 4 tokens" in text
    assert text.count("<tr>") < 100 + 100
    assert len(text) < 1_500_000


def test_a_log_of_one_epoch_says_so(tmp_path: Path) -> None:
    log = MistakeLog(make_log(tmp_path / "log", make_examples(samples=6, epochs=1)))
    text = report_page(log, TokenTexts(None, "ids"))
    assert "nothing to compare" in text and "How errors fall as samples repeat" not in text


def test_what_colours_say_is_in_characters_too(log: MistakeLog) -> None:
    visit = next(s for sample in range(12) for s in visits_of(log, sample) if s.wrong)
    console = Console(file=io.StringIO(), width=200, markup=False, force_terminal=False)
    console.print(sample_view([visit], TokenTexts(None, "")))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for place in np.flatnonzero(~visit.correct):
        assert f"#{visit.truth[place]} «#{visit.others[place, 0]}»" in text
    coloured = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    coloured.print(legend())
    assert "\x1b[" in coloured.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dark", [False, True])
def test_the_scale_reads_in_grey_and_text_reads_on_it(dark: bool) -> None:
    colours = scale(dark)
    steps = [luminance(back) for back, _ in colours]
    assert len(colours) == LEVELS
    assert steps == sorted(steps, reverse=not dark)
    assert min(abs(a - b) for a, b in itertools.pairwise(steps)) > 0.001
    assert min(contrast(back, fore) for back, fore in colours) >= 4.5


def test_levels_cover_the_errors() -> None:
    assert [level(e) for e in (-1e-6, 0, 0.0499, 0.05, 0.999, 1.0, 1.0000001)] == [0, 0, 0, 1, 19, 19, 19]


def test_a_line_with_gaps() -> None:
    values = np.array([8.0, np.nan, 0.1, 0.05])
    chart = line_chart("Loss", [("loss", values)], [(1, 2), (3, 4), (5, 6), (7, 7)])
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--one\)', chart)
    assert line.count("M") == 2, "a gap where there is no value"


def test_a_heat_map_draws_each_cell_in_its_colour() -> None:
    values = np.array([[0.0, 1.0], [0.0, np.nan], [0.5, 1.0]])
    chart = heat_map("t", values, [(1, 1), (2, 2), (3, 3)], width=1, high=1.0)
    cells = Counter(int(shade) for shade in re.findall(r"fill: var\(--e(\d+)\)", chart))
    assert cells == {0: 2, 10: 1, 19: 2}, "no data is none"


def test_charts_have_the_colours_of_the_page() -> None:
    chart = line_chart("Loss", [("a", np.ones(3)), ("b", np.zeros(3))], [(1, 1), (2, 2), (3, 3)])
    assert not re.findall(r"#[0-9a-f]{6}\b", chart), "a fixed colour does not read on dark and on light pages"
    assert "stroke-dasharray" in chart and "var(--one)" in chart and "var(--two)" in chart


def test_escapes(log: MistakeLog) -> None:
    text = sample_page(metadata(run='<a "\x07'), find_visits(log, [0]), TokenTexts(None, ""))
    assert "<title>Run &lt;a &#34;\\x07: sample 0</title>" in text
    assert visible("a\nb\u200b") == "a\nb\\u200b"


# token texts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    return folder


def test_the_tokenizer_of_the_run_is_found_and_checked(tokenizer_folder: Path, tmp_path: Path) -> None:
    right = tokenizer_hash(make_tokenizer())
    named = find_tokenizer(metadata(tokenizer_hash=right, pilot=str(tokenizer_folder)))
    assert named.known and named.sequence([70, 71]) == make_tokenizer().decode([70, 71])
    run = tmp_path / "run"
    (run / "pilot").mkdir(parents=True)
    tokenizer_folder.rename(run / "pilot" / "final")
    assert find_tokenizer(metadata(tokenizer_hash=right, pilot="gone"), run).known
    other = find_tokenizer(metadata(tokenizer_hash="else", pilot="gone"), run)
    assert not other.known and "is another" in other.note and "--tokenizer" in other.note
    with pytest.raises(TokenizerError, match="texts would be wrong"):
        find_tokenizer(metadata(tokenizer_hash="else"), None, str(run / "pilot" / "final"))
    with pytest.raises(TokenizerError, match="no tokenizer can be read"):
        find_tokenizer(metadata(), None, str(tmp_path / "nowhere"))


def test_texts_of_single_tokens() -> None:
    texts = TokenTexts(make_tokenizer(), "")
    ids = make_tokenizer()("a é\n<", add_special_tokens=False)["input_ids"]
    assert [texts.quoted(i) for i in ids] == ["a", "␣", f"#{ids[2]}", f"#{ids[3]}", "↵", "<"]
    assert texts.sequence(ids) == "a é\n<"
    assert texts.flowing(ids[4]) == "↵\n"
    assert (texts.quoted(-1), texts.raw(10**6)) == ("?", "#1000000")
    assert TokenTexts(None, "").quoted(17) == "#17"


def test_sentencepiece_keeps_its_leading_blank() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("x", -3.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend), "")
    assert [texts.raw(i) for i in (1, 3)] == [" the", "x"]
