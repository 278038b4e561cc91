"""The functions of docs/extending.md, as a user's module: each is found by its name and does what the page says."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tc_ray.config.load import load_config
from tc_ray.config.named import check_named
from tc_ray.config.schema import CallbacksSection
from tc_ray.config.yaml_file import ConfigError
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.source.records import Record
from tc_ray.evaluation.scores import MetricError, result
from tc_ray.pilot.callbacks import call_back
from tests.support.evaluation_samples import held_out, row_set
from tests.support.tiny_model import make_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
FORCED = [2, [[0.5, 1.4, 1]]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the page's code as my_module.py."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "my_module.py").write_text("\n\n".join(blocks))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_module", None)


def test_the_settings_that_the_page_shows_are_valid() -> None:
    given = re.findall(r"\b((?:fusion|data|callbacks|pilot)\.\w+=[\w:.]+)", PAGE.read_text(encoding="utf-8"))
    assert len(given) >= 9
    check_named(load_config("demo", list(dict.fromkeys(one for one in given if "nll" not in one))))


def test_the_metric() -> None:
    rows = row_set(held_out(2), "my_module:word_f1")
    found = result(0, rows, FORCED, 0, "Gold and silver")
    assert (found.right, found.score, found.said) == (None, 0.5, "Gold and silver")
    assert result(1, rows, FORCED, 0, "lead").score == 0.0


def test_a_metric_that_fails_names_the_row(here: Path) -> None:
    (here / "my_module.py").write_text("def inf(said, row): return 1e400\ndef bad(said, row): return row.nothing\n")
    for name, why in (("inf", "gave inf; give a finite number"), ("bad", "AttributeError: .*no attribute 'nothing'")):
        with pytest.raises(MetricError, match=rf"metric my_module:{name}, sample 1 of test \(made up\): {why}"):
            result(1, row_set(held_out(2), f"my_module:{name}"), FORCED, 0, "x")


def test_the_converter() -> None:
    config = load_config("demo", ["data.convert=my_module:from_questions", "data.template=plain"]).data
    encoder = Encoder(config, make_tokenizer(), seed=1)
    ticket = {"subject": " Printer ", "body": "It smokes.", "replies": [{"text": "Unplug it.", "accepted": True}]}
    (row,) = encoder.rows(Record(1, "line", "", ticket), held_out=False)
    assert (row["kind"], row["prompt"], row["completion"]) == ("row", "Printer\n\nIt smokes.", "Unplug it.")
    (bad,) = encoder.rows(Record(2, "line", "", ticket | {"replies": []}), held_out=False)
    assert (bad["kind"], bad["problem"]) == ("bad", "data.convert fails: ValueError: no reply was accepted")


def test_a_converter_that_returns_no_record(here: Path) -> None:
    (here / "my_module.py").write_text("def nothing(record): return None\n")
    config = load_config("demo", ["data.convert=my_module:nothing"]).data
    (bad,) = Encoder(config, make_tokenizer(), seed=1).rows(Record(1, "line", "", {}), held_out=False)
    assert bad["problem"] == "data.convert gave NoneType, no dict"


def test_a_converter_that_a_worker_cannot_import_is_no_fault_of_the_records() -> None:
    config = load_config("demo", ["data.convert=elsewhere:f"]).data
    with pytest.raises(ConfigError, match=r"data\.convert is elsewhere:f: there is no module elsewhere"):
        Encoder(config, make_tokenizer(), seed=1).rows(Record(1, "line", "", {}), held_out=False)


def test_the_callbacks(here: Path) -> None:
    names = ("on_round", "on_checkpoint", "on_evaluation")
    settings, events = CallbacksSection(**{name: f"my_module:{name}" for name in names}), list[tuple[str, str]]()

    def report(kind: str, text: str) -> None:
        events.append((kind, text))

    call_back(settings, "on_round", 3, {"loss": 1.5}, report=report)
    call_back(settings, "on_checkpoint", 3, Path("round-000003"), report=report)
    call_back(settings, "on_evaluation", {"results": {"run": {"test": {"value": 0.5}}}}, here, report=report)
    lines = [json.loads(line) for line in (here / "rounds.jsonl").read_text().splitlines()]
    assert lines == [{"round": 3, "loss": 1.5}, {"round": 3, "checkpoint": "round-000003"}]
    assert json.loads((here / "values.json").read_text()) == {"run": {"test": 0.5}}
    assert not events
    call_back(settings, "on_round", 4, {}, report=report)
    assert events == [("callback", "callbacks.on_round my_module:on_round failed: KeyError: 'loss'")]
