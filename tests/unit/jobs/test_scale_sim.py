"""The simulator of clusters: real commits of few writers, loads by hand, and advice that ends."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tc_ray.mistakelog.commit.ledger import Ledger
from tests.support.run_costs import make_run, usual_lines, write_log
from tests.unit.jobs.test_benchmarks import in_this_process

SCRIPT = Path(__file__).resolve().parents[3] / "jobs" / "benchmarks" / "scale_sim.py"


@pytest.fixture(scope="module")
def sim() -> Any:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def setup(sim: Any) -> Any:
    """1 MB per GPU and round."""
    row = sim.Row(tokens=101, targets=10, width=5000 - 50, top_k=4)
    return sim.Setup(row, 1, 2.0, 0.5, 3, flush_rounds=4, file_bytes=2**27, buffer_rounds=128, scale=1e6 / row.bytes)


def test_a_row_has_the_bytes_of_a_record(sim: Any) -> None:
    row = sim.Row(tokens=64, targets=16, width=256, top_k=16)
    records = sim.make_records(1, tokens=64, targets=16, width=256, top_k=16)
    assert row.bytes == pytest.approx(records.nbytes / len(records), rel=0.02)
    assert replace(row, positions="target").bytes < 0.4 * row.bytes


def test_the_commits_are_real_and_wait_for_each_other(sim: Any, setup: Any, tmp_path: Path) -> None:
    made = sim.run_commits(tmp_path / "log", setup, 3, 9)
    assert (made.writers, made.files) == (3, 9)
    state = Ledger(tmp_path / "log", writers=3, run="benchmark").state()
    assert (state.files, state.round, state.bytes) == (9, 12, 9 * 4_000_000)
    assert made.processor > 0 and 0 < made.seconds < made.waits[1] < 8


def test_waits_are_those_of_a_slow_clock(sim: Any) -> None:
    """Two writers a tick of 1 s: the Ledger keeps up at first, then falls behind."""
    found = sim.waits_of(sim.np.array([[0.25, 0.5], [0.75, 0.75], [0.1, 0.2]]), 1.0)
    assert found == pytest.approx(sim.np.array([[0.25, 0.75], [0.75, 1.5], [0.6, 0.8]]))


def test_loads_are_those_of_the_formulas(sim: Any, setup: Any) -> None:
    at = sim.Machine(store=100.0, read=50.0, memory=1.5, learner_gigabytes=64.0)
    commits = sim.Commits(63, 0.01, 0.005, (0.1, 0.2), 0.0, 0.1, 0.1, 63)
    found = sim.loads(setup, at, commits, 64)
    assert found == pytest.approx(
        {
            "Ledger": 63 * 0.01 / 8,
            "store": 63 / 2 / 100,
            "reading": 63 / 2 / 50,
            "Copilot steps": 3 * 0.5 / 2,
            "learner memory": 128 * 63e6 * 1.5 / 64e9,
        }
    )


def test_advice_ends_below_the_limit_or_says_for_what_no_setting_is_left(sim: Any, setup: Any) -> None:
    at = sim.Machine(store=1000.0, read=500.0, memory=1.0, learner_gigabytes=64.0)
    commits = sim.Commits(1000, 0.01, 0.005, (0.1, 0.2), 0.0, 0.1, 0.1, 1000)
    advice = sim.advise(setup, at, commits, 1024)
    assert not advice.stuck and max(advice.loads.values()) <= sim.SAFE
    assert {"log.flush_rounds", "log.positions"} <= set(advice.settings)
    slow = replace(commits, seconds=1.0)
    assert sim.advise(setup, at, slow, 1024).stuck == "Ledger"


def test_the_script_runs_as_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(folder, usual_lines(), copilot={"steps_per_round": 3})
    write_log(folder, rounds=6)
    options = ["--from", str(folder), "--gpus", "2", "4", "--commits", "6", "--store-megabytes", "500"]
    printed, result = in_this_process("scale_sim.py", tmp_path, *options)
    assert [one["commits"]["files"] for one in result["clusters"]] == [6, 6]
    assert result["setup"]["round_seconds"] == pytest.approx(10.5 / 6) and result["setup"]["step_seconds"] == 1.0
    per_round = sum(path.stat().st_size for path in (folder / "log").glob("*.parquet")) / 6
    assert result["writer_bytes"] == pytest.approx(per_round * 16 / 4), "16 examples a round, of which the log holds 4"
    for words in ("Costs of a unit", "first bottleneck", "What to change", "4 GPUs", result["machine"]):
        assert words in printed
    assert json.loads(json.dumps(result)) == result
