"""The forms of known tasks: each reads a small file made by hand, whose prompts, answers and scores are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.data import DataSection
from tc_ray.config.yaml_file import ConfigError
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.source.files import DataFile
from tc_ray.data.source.records import Record
from tc_ray.data.source.sequences import SequenceReader, label_items, scan
from tc_ray.data.source.task_form import TASKS, load_task
from tc_ray.evaluation.rows import HeldOut
from tc_ray.evaluation.scores import check_gold, ranking_measures, result
from tests.support.evaluation_samples import row_set
from tests.support.tiny_model import make_tokenizer

FILES = Path(__file__).parent / "tasks"
PLAIN = DataSection(template="plain", plain_template="{prompt}\n", cutoff_tokens=2000)


def encoded(task: str, record: Any, *, held_out: bool = True) -> dict[str, Any]:
    encoder = Encoder(PLAIN, make_tokenizer(), 1).for_task(task)
    return encoder.rows(Record(1, "line", "", record), held_out=held_out)[0]


def as_held_out(row: dict[str, Any]) -> HeldOut:
    return HeldOut(
        0,
        row["input_ids"],
        row["target_start"],
        row["answer"] or row["completion"],
        row["prompt"],
        row["completion"],
        tuple(row["options"] or ()),
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in FILES.glob("*.jsonl")))
def test_a_task_s_file_has_the_scores_that_are_known(name: str) -> None:
    form = load_task(name)
    for line in (FILES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        known = json.loads(line)
        row = encoded(name, known["record"])
        assert row["kind"] == "row", row
        assert (row["prompt"], row["answer"]) == (known["prompt"], known["answer"])
        rows = row_set([as_held_out(row)], form.metric, option_by=form.choose_option_by)
        check_gold(rows)
        if form.metric == "choice":
            options = row["options"]
            assert len(options) == len(known["nats"]) == len(form.options)
            # what is chosen is exactly what a model of this task learns to say
            assert options == [form.completion.format(answer=option) for option in form.options]
            forced = [[3, [[0.0, nats, 0.0]]] for nats in known["nats"]]
            found = result(0, rows, forced, 0, None)
        else:
            assert row["options"] is None
            found = result(0, rows, [1, [[0.0, 1.0, 0.0]]], 0, known["said"])
        assert found.right == known["right"], known
        # the same record can be trained on
        if "output" in known["record"] or "instruction" not in known["record"]:
            trained = encoded(name, known["record"], held_out=False)
            assert trained["kind"] == "row" and trained["completion"], trained


@pytest.mark.parametrize("name", ["beauty", "lastfm"])
def test_recommendation_reads_sequences(name: str) -> None:
    """Ranked by label: places, hits and NDCG follow by hand."""
    assert load_task(name).metric == "ranking"
    file = FILES / f"{name}.txt"
    found = scan([DataFile(str(file))])
    labels = label_items(found.items, 1)
    rows = []
    for record in SequenceReader("test", labels, found.left_out, PLAIN.sequences)(DataFile(str(file))):
        row = encoded(name, record.value)
        items = file.read_text().splitlines()[len(rows)].split()[1:]
        assert row["answer"] == labels[items[-1]]
        assert row["prompt"] == " ".join(labels[item] for item in items[:-1])
        rows.append(as_held_out(row))
    assert len(rows) == 3
    check_gold(row_set(rows, "ranking"), list(labels.values()))
    ranked = sorted(labels.values())
    placed = [ranked.index(row.answer) + 1 for row in rows]
    results = [
        result(i, row_set(rows, "ranking"), [1, [[0.0, 1.0, 0.0]]], 0, [place, ""]) for i, place in enumerate(placed)
    ]
    assert [one.right for one in results] == [True] * 3
    assert ranking_measures(results, [1])["Hit@1"] == [float(place == 1) for place in placed]


def test_the_twelve_tasks_are_there() -> None:
    twelve = "piqa winogrande hellaswag boolq siqa obqa aqua gsm8k mawps svamp beauty lastfm"
    assert (
        {path.stem for path in TASKS.glob("*.yaml")} == set(twelve.split()) == {path.stem for path in FILES.iterdir()}
    )


def test_a_record_that_does_not_fit_is_a_bad_row() -> None:
    missing = encoded("piqa", {"goal": "x", "sol1": "a", "label": 0})
    assert (missing["kind"], missing["field"]) == ("bad", "sol2") and "is missing" in missing["problem"]
    other = encoded("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": -1})
    assert (other["kind"], other["problem"]) == ("bad", "is '-1'") and "use one of 0, 1" in other["fix"]
    for nothing in (None, float("nan")):
        empty = encoded("piqa", {"goal": nothing, "sol1": "a", "sol2": "b", "label": 0})
        assert (empty["kind"], empty["field"]) == ("bad", "goal"), "no word of None or nan in a prompt"
        row = encoded("piqa", {"prompt": nothing, "goal": "x", "sol1": "a", "sol2": "b", "label": 0})
        assert row["prompt"].startswith("Please choose"), "a column of a table, empty in this row"
    no_mark = encoded("gsm8k", {"question": "x", "answer": "72"})
    assert no_mark["kind"] == "bad" and "is not in it" in no_mark["problem"]


def test_options_come_from_the_row_too() -> None:
    encoder = Encoder(PLAIN, make_tokenizer(), 1)

    def row(**fields: Any) -> dict[str, Any]:
        return encoder.rows(Record(1, "line", "", {"prompt": "p", **fields}), held_out=True)[0]

    by_text = row(options=["a cat", "a dog"], answer="a dog")
    by_number = row(options=["a cat", "a dog"], answer=1)
    assert by_text["options"] == ["a cat", "a dog"] and by_text["answer"] == by_number["answer"] == "a dog"
    assert row(options=["1", "2"], answer=1)["answer"] == "1", "an option's own text goes first"
    for bad in (["one"], ["a", "a"], "ab", ["a", 3], ["a", " "]):
        assert (row(options=bad, answer="a")["kind"], row(options=bad, answer="a")["field"]) == ("bad", "options")


def test_a_form_of_one_s_own_and_bad_ones(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text('metric: choice\nprompt: "Q: {q}"\nanswer: "{a}"\noptions: [x, y]\n')
    assert encoded(str(own), {"q": "why", "a": "y"})["options"] == ["x", "y"]
    with pytest.raises(ConfigError, match=r"task nonsense is neither a file nor one of tc-ray's; these are aqua, .*"):
        load_task("nonsense")
    for text, said in (
        ("metric: taste\n", r"mine\.yaml, line 1: metric: "),
        ("metric: choice\noptions: [a]\n", r"mine\.yaml, line 2: options: .*two different options"),
        ("metric: nll\nanswers: x\n", r"mine\.yaml, line 2: answers: "),
        ("prompt: x\n", r"mine\.yaml: metric: Field required"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load_task(str(own))
