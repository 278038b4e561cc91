"""Parts of a pass: what decides their folder, what a torn one does, what a line of progress says."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tc_ray.evaluation.passes import Pass, read_parts
from tc_ray.evaluation.progress import Progress, TrackedProgress
from tests.support.evaluation_samples import held_out, row_set, source
from tests.support.torn_files import torn_forms

CHOICES = (("logits", 0.0), ("logits", 0.5))


def job(**more: Any) -> Pass:
    return Pass("said", source(), row_set(held_out()), CHOICES, "own", 8, 16, **more)


def test_whatever_decides_a_result_decides_the_key() -> None:
    other_rows = [replace(row, answer="else") for row in held_out()]
    longer = [replace(row, input_ids=[*row.input_ids, 3]) for row in held_out()]
    changed = [
        replace(job(), source=replace(source(), weights="others")),
        replace(job(), source=replace(source(), dtype="bf16")),
        replace(job(), rows=row_set(other_rows)),
        replace(job(), rows=row_set(longer)),
        replace(job(), rows=row_set(held_out()[:-1])),
        replace(job(), choices=CHOICES[:1]),
        replace(job(), choices=(CHOICES[0], ("probability", 0.5))),
        replace(job(), feedback="realised"),
        replace(job(), max_new_tokens=17),
        replace(job(), num_beams=2),
        replace(job(), kind="forced"),
        replace(job(), kind="ranked", beams=5, labels=("1", "2")),
        replace(job(), kind="ranked", beams=5, labels=("1", "3")),
    ]
    keys = {one.key for one in changed}
    assert len(keys) == len(changed) and job().key not in keys
    same = [replace(job(), batch_size=3), replace(job(), rows=row_set(held_out(), "choice", "other"))]
    assert {one.key for one in same} == {job().key}, "batches, names and metrics change nothing that is computed"


def test_a_torn_part_is_computed_again(tmp_path: Path) -> None:
    whole = "".join(json.dumps({"row": row, "found": ["x"]}) + "\n" for row in (3, 5))
    (tmp_path / "whole.jsonl").write_text(whole)
    assert read_parts(tmp_path / "nothing") == {}
    for name, form in torn_forms(whole.encode()).items():
        if isinstance(form, bytes) and form != whole.encode():
            (tmp_path / "torn.jsonl").write_bytes(form)
            assert {3: ["x"], 5: ["x"]}.items() <= read_parts(tmp_path).items(), name


def shown(terminal: bool) -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress(Console(file=text, force_terminal=terminal, width=200, legacy_windows=False)), text


def test_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes of a pass that does a row a second."""
    clock = [1000.0]
    monkeypatch.setattr("tc_ray.evaluation.progress.time.monotonic", lambda: clock[0])
    progress, text = shown(False)
    times = []
    for second in range(601):
        before = len(text.getvalue())
        progress.show("m on test (decoded)", second, 600)
        clock[0] += 1
        times += [second] if len(text.getvalue()) > before else []
    lines = text.getvalue().splitlines()
    assert lines[0] == "evaluate: m on test (decoded): 0 of 600 rows" and lines[-1].endswith("600 of 600 rows")
    assert max(b - a for a, b in pairwise(times)) <= 6 and len(lines) < 150
    progress.show("m on test (decoded)", 600, 600)
    assert text.getvalue().splitlines() == lines, "nothing new, nothing said"


def test_a_terminal_has_a_bar() -> None:
    progress, text = shown(True)
    with progress:
        progress.show("m on test (decoded)", 30, 60)
        progress.show("m on test (decoded)", 60, 60)
        progress.note("\x1b[31mred")
    assert f"[{'#' * 12}{'.' * 12}] 30 of 60 rows" in text.getvalue()
    assert "evaluate: m on test (decoded): 60 of 60 rows\n" in text.getvalue()
    assert "\\x1b[31mred" in text.getvalue()


def test_a_run_s_tracker_gets_waits_and_events() -> None:
    said: list[tuple[str, ...]] = []

    class Method:
        def __init__(self, name: str) -> None:
            self.name = name

        def remote(self, *arguments: str) -> None:
            said.append((self.name, *arguments))

    class Tracker:
        waiting, event = Method("waiting"), Method("event")

    with TrackedProgress(Tracker()) as progress:
        progress.show("m on test", 1, 2)
        progress.show("m on test", 2, 2)
    assert said == [
        ("waiting", "evaluation", "m on test: 1 of 2 rows"),
        ("event", "evaluate", "m on test: 2 of 2 rows"),
        ("waiting", "evaluation", ""),
    ]


def test_what_a_pass_says_of_itself() -> None:
    assert job().shown == "m on test, lambda 0, 0.5 in logits space (decoded)"
    assert replace(job(), choices=CHOICES * 2).shown == "m on test, 4 lambdas (decoded)"
    assert replace(job(), source=source(fused=False), kind="forced").shown == "m on test (scored)"
