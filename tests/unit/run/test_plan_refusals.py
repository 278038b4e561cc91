"""What a plan says of a run that would refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tc_ray.config.load import save_config
from tc_ray.run.plan.plan import make_plan
from tests.support.command_line import tc_ray
from tests.support.plan_samples import BATCH, ROWS, config_of


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_what_the_run_would_refuse_stands_in_the_plan(
    tiny: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fault 22: each of these was a note or nothing, and exit code 0."""

    def refusals(train: Path | str = data, **sections: dict[str, Any]) -> str:
        return "; ".join(make_plan(config_of(tiny, str(train), tmp_path / "run", **sections)).refusals)

    assert refusals() == ""
    few = write(tmp_path / "few.jsonl", [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(12)])
    assert f"cannot fill a round of pilot.batch_size {BATCH}" in refusals(few)
    bad = [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(60)] + [{"prompt": 5}, {"prompt": "3+4"}]
    said = refusals(write(tmp_path / "bad.jsonl", bad))
    assert "data.train: of 62 records 2 are bad, 0 have a prompt longer than data.cutoff_tokens" in said
    assert f"bad: {tmp_path / 'bad.jsonl'}, line 61, field prompt: is int, not text; write it as a string" in said
    assert "bad.jsonl, line 62, field completion: is missing" in said
    assert refusals(tmp_path / "bad.jsonl", data={"max_bad_fraction": 0.1}) == ""
    assert "absent.jsonl on this machine: " in refusals(tmp_path / "absent.jsonl")
    assert "absent.jsonl; correct the path" in refusals(tmp_path / "absent.jsonl")
    chats = write(tmp_path / "chats.jsonl", [{"conversations": []}] * 3)
    assert "3 are bad" in refusals(chats)
    assert "line 1, field conversations: is an empty list; give a list of {role, content}" in refusals(chats)
    chats = write(tmp_path / "chats.jsonl", [{"dialogue": []}] * 3)
    assert "3 are bad" in refusals(chats) and "line 1: has the fields dialogue; give" in refusals(chats)
    sizes = {"validation_size": 200, "test_size": 300}
    arithmetic = (
        f"data.validation_size 200 + data.test_size 300 is 500 rows, more than the {ROWS} usable rows of data.train"
    )
    assert arithmetic in refusals(data=sizes)
    same = write(tmp_path / "same.jsonl", [{"prompt": "Write a haiku", "completion": f"h{i}"} for i in range(60)])
    assert "60 rows with 1 different prompts leave nothing to train on after the cut" in refusals(same)
    assert "no test rows to measure with" in refusals(data={"test_size": 0})
    assert refusals(data={"test_size": 0}, log={"enabled": False}) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "asks for 2 GPUs, this machine has 1" in refusals(resources={"pilot_gpus": 1, "copilot_gpus": 1})
    assert "asks for 1.1 GPUs, this machine has 1" in refusals(resources={"pilot_gpus": 0.6, "copilot_gpus": 0.5})
    assert refusals(resources={"pilot_gpus": 1}) == refusals(resources={"pilot_gpus": 0.6, "copilot_gpus": 0.4}) == ""
    pinned = {"copilot_resources": {"rack_b": 1}, "pilot_resources": {"accelerator_type:H100": 0.01}}
    assert "no node of a local Ray has rack_b: join a cluster" in refusals(resources=pinned)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert refusals(resources=pinned | {"pilot_gpus": 1, "copilot_gpus": 1}) == ""

    earlier = config_of(tiny, str(data), tmp_path / "run", pilot={"learning_rate": 0.5})
    (tmp_path / "run").mkdir()
    save_config(earlier, tmp_path / "run" / "config.yaml")
    assert "holds a run with other settings (pilot.learning_rate: 0.5" in refusals()


def test_a_plan_shows_why_rows_of_each_part_are_not_usable(tiny: Path, tmp_path: Path) -> None:
    """Issue 18: the messages were there and the plan threw them away; held-out files were not looked at."""
    good: list[dict[str, Any]] = [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(60)]
    train = write(tmp_path / "t.jsonl", [*good[:7], {"prompt": "p", "completion": " "}, *good[7:]])
    long = [{"prompt": "w " * 300, "completion": "c"}] * 3
    test = {"mine": str(write(tmp_path / "x.jsonl", [*good, *long, {"prompt": "q"}]))}
    plan = make_plan(config_of(tiny, str(train), tmp_path / "run", data={"test": test, "max_bad_fraction": 0.05}))
    assert plan.refusals == []
    for said in (
        "data.train: of 61 records 1 are bad, 0 have a prompt longer than data.cutoff_tokens",
        f"bad: {train}, line 8, field completion: is empty; fill it in or leave the record out",
        "data.test.mine: of 64 records 1 are bad, 3 have a prompt longer than data.cutoff_tokens",
        f"bad: {test['mine']}, line 64, field answer: neither a completion nor an answer",
    ):
        assert said in str(plan)
    test["mine"] = str(write(tmp_path / "y.jsonl", long))
    (refused,) = make_plan(config_of(tiny, str(train), tmp_path / "run", data={"test": test})).refusals
    assert "data.test.mine: of 3 records 0 are bad, 3 have a prompt longer" in refused


def test_a_plan_counts_rows_by_their_weights(tiny: Path, tmp_path: Path) -> None:
    short = write(tmp_path / "a.jsonl", [{"prompt": f"{i}", "completion": "c"} for i in range(50)])
    more = write(tmp_path / "b.jsonl", [{"prompt": f"{i} and more words", "completion": "c"} for i in range(50)])
    mixture = [{"file": str(short), "weight": 3}, {"file": str(more), "weight": 0.5}]
    once = make_plan(config_of(tiny, f"{tmp_path}/?.jsonl", tmp_path / "run")).data
    plan = make_plan(config_of(tiny, "", tmp_path / "run", data={"train": mixture}))
    assert once is not None and plan.data is not None
    assert (once.rows, plan.data.rows) == (80, 140) and plan.data.mean_tokens < once.mean_tokens
    assert "a.jsonl (weight 3)" in str(plan)


def test_the_command_ends_with_2_and_prints_the_plan_all_the_same(
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    """Fault 22."""
    arguments = [f"model.pilot={tiny}", f"data.train={data}", f"run.folder={tmp_path / 'run'}", "data.test_size=0"]
    settings = ["pilot.lora.first_layer=0", "copilot.layers=[1, 3]", "data.validation_size=8"]
    done = tc_ray("train", "demo", *arguments, *settings, "--plan")
    assert (done.returncode, done.stderr) == (
        2,
        "tc-ray: the run would refuse: no test rows to measure with: set data.test or a data.test_size above 0\n",
    )
    assert "rounds" in done.stdout and "refused    no test rows" in done.stdout


@pytest.mark.parametrize("damage", ["a date", "bytes"])
def test_values_that_python_cannot_hold_are_named_as_data(tiny: Path, tmp_path: Path, damage: str) -> None:
    """A fault found by attack: the plan blamed the tokenizer for them, or ended in a traceback."""
    columns: dict[str, pa.Array] = {name: pa.array(["a"] * 60) for name in ("prompt", "completion")}
    if damage == "a date":
        columns["day"] = pa.array([2**31 - 1] * 60, pa.int32()).cast(pa.date32())
    else:
        columns["prompt"] = pa.array([b"\xff\xfe"] * 60).cast(pa.string(), safe=False)
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    (refused,) = make_plan(config_of(tiny, str(tmp_path / "t.parquet"), tmp_path / "run")).refusals
    field, problem = ("day", "cannot be read") if damage == "a date" else ("prompt", "not UTF-8 at byte 1")
    assert f"t.parquet, row 1, field {field}: {problem}" in refused and "tokenizer" not in refused
