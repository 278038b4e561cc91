"""Rows of any columns through `data.prompt`, `data.completion` and `data.answer`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tc_ray.config.data import DataSection
from tc_ray.config.load import load_config
from tc_ray.config.yaml_file import ConfigError
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.prepared.prepare import prepare
from tc_ray.data.source.records import BadRow, DataError
from tc_ray.data.source.templates import filled
from tests.support.data_writers import SUMS, lines
from tests.support.tiny_model import make_tokenizer

QUESTIONS = [
    {
        "id": f"7-{i}",
        "question_stem": f"What is {i}?",
        "choices": {"text": [f"odd {i}", f"even {i}"], "label": ["A", "B"]},
        "answerKey": "AB"[i % 2],
        "Note of the author": "n",
    }
    for i in range(60)
]
PROMPT = "{{question_stem}}\nA) {{choices.text[0]}} B) {{choices.text[1]}}\n"
ANSWER = "{{answerKey}}"


def test_a_raw_file_of_the_hub_is_trained_on_without_a_converter(tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [*QUESTIONS[:9], {"question_stem": "q", "answerKey": "A"}, *QUESTIONS[9:]])
    completion = "the answer is {{answerKey}}) {{choices.text[choices.label.index(answerKey)]}}\n"
    config = DataSection(
        train=str(file),
        template="plain",
        plain_template="{prompt}",
        prompt=PROMPT,
        completion=completion,
        answer=ANSWER,
        max_bad_fraction=0.02,
    )
    prepared = prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "out")
    rows = pq.read_table(prepared.file("train")).to_pylist()
    number = int(rows[0]["prompt"].split("?")[0].split()[-1])
    kind = ["odd", "even"][number % 2]
    assert rows[0]["prompt"] == f"What is {number}?\nA) odd {number} B) even {number}\n"
    assert (rows[0]["completion"], rows[0]["answer"]) == (
        f"the answer is {'AB'[number % 2]}) {kind} {number}\n",
        "AB"[number % 2],
    )
    (bad,) = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert (bad["place"], bad["field"]) == (10, "data.prompt")
    assert bad["problem"] == "'choices' is undefined; the row has the columns question_stem, answerKey"
    assert any("t.jsonl, line 10, field data.prompt: 'choices' is undefined" in note for note in prepared.notes)


def test_a_wrong_column_refuses_the_run_with_row_column_and_columns(tmp_path: Path) -> None:
    config = DataSection(train=str(lines(tmp_path / "t.jsonl", QUESTIONS)), prompt="{{questoin}}", completion=ANSWER)
    with pytest.raises(DataError) as caught:
        prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "out")
    assert (
        "t.jsonl, line 1, field data.prompt: 'questoin' is undefined; the row has the columns id, question_stem"
        in str(caught.value)
    )


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{x.y}}", "'x' is undefined"),
        ("{{choices.texts[0]}}", "has no attribute 'texts'"),
        ("{{choices.text[7]}}", "has no element 7"),
        ("{{nothing}}", "it prints a null"),
        ("{{nan}}", "it prints a null"),
        ("{{choices.items}}", "it prints the method items"),
        ("{{choices}}", "it prints dict"),
        ("{{choices.text}}", "it prints list"),
        ("{{choices.text|map('upper')}}", "it prints generator"),
        ("{{question_stem ~ ' ' ~ nothing}}", "it prints a null"),
        ("{{nothing|trim}}", "it prints a null"),
        ("{{nan|string}}", "it prints a null"),
        ("{{[question_stem, nothing]|join}}", "it prints a null"),
        ("{{'%s'|format(nothing)}}", "it prints a null"),
        ("{{'{}'.format(nothing)}}", "it prints a null"),
        ("{{row['deep'].list|join}}", "it prints a null"),
        ("{{'' ~ row['deep']}}", "it prints a null"),
        ("{{question_stem.__class__.__mro__}}", "unsafe"),
        ("{{range(10**9)|list}}", "Range too big"),
        ("{{1/0}}", "division by zero"),
        ("{% if nope %}x{% endif %}", "'nope' is undefined"),
    ],
)
def test_what_a_template_cannot_print_is_a_bad_row(template: str, problem: str) -> None:
    nulls = {"nothing": None, "nan": float("nan"), "deep": {"list": ["a", None]}}
    bad = filled(QUESTIONS[0] | nulls, {"prompt": template})
    assert isinstance(bad, BadRow) and bad.field == "data.prompt"
    assert problem in bad.problem and "the row has the columns id, question_stem, choices" in bad.problem


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{c or ''}}|{{nan or ''}}", "|"),
        ("{% if c %}x{% endif %}{% if not c %}y{% endif %}", "y"),
        ("{{c is none}} {{q is none}} {{c == none}} {{c is not none}}", "True False True False"),
        ("{{q if c is none else c}}{{c|default('d', true)}}", "qd"),
        ("{{[q, c, q]|select|join(' ')}}{{[q, c]|reject('none')|join}}", "q qq"),
        ("{{deep|tojson}}", '{"list": ["a", null]}'),
        ("{{deep.list[0] ~ (deep.list[1] or '-')}}", "a-"),
    ],
)
def test_a_null_can_be_asked_for(template: str, text: str) -> None:
    row = {"q": "q", "c": None, "nan": float("nan"), "deep": {"list": ["a", None]}}
    assert filled(row, {"prompt": template}) == {"prompt": text}


def test_templates_take_columns_of_any_name_and_keep_what_they_do_not_replace() -> None:
    row = QUESTIONS[0] | {"nothing": None, "options": ["a", "b"], "completion": "kept", "messages": "other"}
    text = (
        "{{row['Note of the author']}} {{nothing or ''}}{% for c in choices.text %}{{loop.index}}.{{c}};{% endfor %}\n"
    )
    kept = {"completion": "kept", "options": ["a", "b"]}
    assert filled(row, {"prompt": text}) == {"prompt": "n 1.odd 0;2.even 0;\n", **kept}
    assert filled({"n": 3, "a": "<b> & 'c'"}, {"prompt": "{{n}}{{a}}"}) == {"prompt": "3<b> & 'c'"}
    assert filled(["no", "object"], {"prompt": "{{n}}"}) == ["no", "object"]
    assert isinstance(filled(BadRow("", "p", "f"), {"prompt": "x"}), BadRow)
    assert filled(row, {}) is row


def test_templates_read_the_record_that_a_converter_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_rows.py").write_text("def split(row):\n    return dict(zip(('q', 'a'), row['text'].split('|')))\n")
    rows = [*({"text": f"{i}?|{i}"} for i in range(60)), {"text": "no answer"}]
    config = DataSection(
        train=str(lines(tmp_path / "t.jsonl", rows)),
        convert="of_rows:split",
        prompt="Q {{q}}",
        completion="A {{a}}",
        template="plain",
    )
    prepared = prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "out")
    number = (row := pq.read_table(prepared.file("train")).to_pylist()[0])["completion"].removeprefix("A ")
    assert row["prompt"] == f"Q {number}?"
    (bad,) = [json.loads(line) for line in (prepared.folder / "quarantine.jsonl").read_text().splitlines()]
    assert (bad["place"], bad["problem"]) == (61, "'a' is undefined; the row has the columns q")


def test_templates_are_checked_with_the_config(tmp_path: Path) -> None:
    for given, problem in (
        (["data.prompt={{question"], "prompt is no Jinja template: unexpected end of template"),
        (["data.prompt={{q}}", "data.task=boolq"], "task .*boolq makes the records, so leave out prompt"),
        (["data.answer={{q}}", "data.format=sequences"], "format: sequences makes the records, so leave out answer"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_config(None, given)
    assert load_config(None, ["data.prompt={{ q }}\n"]).data.prompt == "{{ q }}\n"


def test_a_set_with_a_task_of_its_own_is_read_by_it(tmp_path: Path) -> None:
    raw = [{"goal": f"g{i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(4)]
    test = {
        "piqa": {"file": str(lines(tmp_path / "p.jsonl", raw)), "task": "piqa"},
        "own": str(lines(tmp_path / "o.jsonl", QUESTIONS)),
    }
    config = DataSection(
        train=str(lines(tmp_path / "t.jsonl", QUESTIONS)), test=test, prompt=PROMPT, completion=ANSWER, template="plain"
    )
    assert prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "out").rows["test"] == 64


def test_the_fallback_leaves_templates_out(tmp_path: Path) -> None:
    config = DataSection(
        train=str(tmp_path / "no.jsonl"), fallback="embedded", embedded_rows=40, prompt="{{q}}", template="plain"
    )
    prepared = prepare(Encoder(config, make_tokenizer(), 1), tmp_path / "out")
    assert sum(prepared.rows.values()) == 40 and not prepared.quarantined
    sums = DataSection(train=str(lines(tmp_path / "t.jsonl", SUMS)), prompt="Q {{prompt}}", template="plain")
    assert (
        pq.read_table(prepare(Encoder(sums, make_tokenizer(), 1), tmp_path / "o").file("test"))["prompt"][0].as_py()[:2]
        == "Q "
    )


def test_the_example_of_the_page_is_right() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data-sources.md").read_text()
    example, mixture = (yaml.safe_load(text)["data"] for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    config = DataSection(**example)
    row = {**QUESTIONS[1], "answerKey": "B"}
    assert filled(row, config.templates) == {
        "prompt": "What is 1?\nA) odd 1\nB) even 1\n\n",
        "completion": "The answer is B",
        "answer": "B",
    }
    assert [one.weight for one in DataSection(**mixture).train_sources()] == [2, 0.25, 1]
