"""`tc-ray report`: the numbers by hand, runs that were killed, comparisons that are refused, the page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tc_ray.cluster.measure import peak_memory
from tc_ray.run.costs.measured import Curve, read_costs
from tc_ray.run.costs.page import MOST_POINTS, binned, costs_page
from tc_ray.run.costs.tables import OtherRunError, bottleneck, lines, tables
from tests.support.command_line import tc_ray
from tests.support.run_costs import make_run, measured, usual_lines, write_log

COPILOT = {"steps_per_round": 3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Six rounds, with a real log."""
    folder = make_run(tmp_path / "run", usual_lines(), copilot=COPILOT)
    write_log(folder, rounds=6)
    return folder


def test_the_parts_add_up_to_the_time_of_the_run(run: Path) -> None:
    costs = read_costs(run)
    assert costs.seconds == 50.0 and math.isclose(sum(costs.parts.values()), costs.seconds)
    found = {name: seconds for name, seconds in costs.parts.items() if seconds}
    assert found == {
        "starting Ray": 4.0,
        "data": 3.0,
        "models, log, tracking": 2.5,
        "starting workers, rounds again": 5.0,  # 24 of the phase, of which the Pilot reported 6 + 10.5 + 1.5 + 1
        "Pilot: loading": 6.0,
        "Pilot: rounds": 10.5,
        "Pilot: waits for the log": 1.5,
        "Pilot: checkpoints": 1.0,
        "evaluation": 7.5,
        "rest": 9.0,
    }


def test_speed_and_capacity_are_those_of_the_formula(run: Path) -> None:
    costs = read_costs(run)
    assert costs.pilot.tokens_per_second == pytest.approx(600 / 10.5)
    assert costs.produced == pytest.approx(6 / (10.5 + 1.0))
    assert costs.consumable == pytest.approx(1 / (3 * 1.0))
    assert costs.copilot.tokens_per_second == pytest.approx(40.0)
    assert costs.idle == 0.0
    text = bottleneck(costs)
    assert "the Copilot is the bottleneck, 1.57 times too slow; it falls behind by 0.19 rounds/s" in text
    fast = replace(costs, copilot=replace(costs.copilot, seconds=1.8))
    assert "the Pilot sets the pace, the Copilot has 6.39 times what is needed" in bottleneck(fast)


def test_the_lag_is_that_of_a_slow_reference(run: Path) -> None:
    """At 1030 the Pilot has ended; the Copilot's steps 1 to 18 come at 1021 .. 1038 and answer rounds 0, 0, 1, 1, ..."""
    costs = read_costs(run)
    for at, lag in zip(costs.lag.x, costs.lag.y, strict=True):
        made = min(6, max(0, int((at + 1000 - 1018) // 2)))
        taken = min(6, max(0, int(at + 1000 - 1020) // 3))
        # of two at one time the Copilot's step counts first
        assert lag in (made - taken, made - 1 - taken), (at, lag)
    assert costs.lag.y[-1] == 0.0 and costs.lag.y.max() == 3.0


def test_time_between_two_starts_does_not_count(tmp_path: Path) -> None:
    """Killed at 1032, started again at 5000; the Tracker of the second start was restarted once."""
    first = [line for line in usual_lines() if line["time"] <= 1032]
    again = [
        {"kind": "start", "time": 5008.0, "round": 6, "began": 5000.0},
        measured("time", 5008.0, 6, ray=2.0),
        {"kind": "start", "time": 5011.0, "round": 6, "began": 5000.0},
        measured("pilot", 5012.0, 7, round_seconds=2.0, tokens=100, log_blocked_seconds=0.25),
    ]
    costs = read_costs(make_run(tmp_path, [*first, *again], state="running", copilot=COPILOT))
    assert (costs.starts, costs.seconds) == (2, 32 + 12)
    assert costs.blocked == pytest.approx(1.5 + 0.25), "each attempt counts from 0"
    assert math.isclose(sum(costs.parts.values()), costs.seconds) and costs.lag.x.max() <= costs.seconds
    assert costs.log is None


def test_the_log_is_measured_in_its_table(run: Path) -> None:
    costs = read_costs(run)
    assert costs.log is not None
    on_disk = sum(path.stat().st_size for path in (run / "log").glob("*.parquet"))
    assert (costs.log.bytes, costs.log.rows, costs.log.rounds, costs.log.tokens) == (on_disk, 24, 6, 600)
    (text,) = [line for line in lines(costs) if line.startswith("log ")]
    assert f"{on_disk / 6000:.1f} KB a round, {on_disk / 600:.0f} B per token; the Pilot waited 1.5 s for it" in text


def test_a_run_without_a_log_and_one_that_has_just_begun(tmp_path: Path) -> None:
    plain = read_costs(make_run(tmp_path / "plain", usual_lines(log=False), log={"enabled": False}))
    assert plain.log is None and not len(plain.lag.x) and "capacity" not in " ".join(lines(plain))
    begun = read_costs(make_run(tmp_path / "begun", usual_lines()[:2], state="running"))
    assert begun.pilot.count == 0 and math.isnan(begun.produced)
    assert len(tables([plain, begun])) == 5 and "<svg" in costs_page([begun])


def test_the_cost_of_a_log_against_a_run_without(run: Path, tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", usual_lines(log=False, round_seconds=1.6), log={"enabled": False})
    table = tables([read_costs(run)], read_costs(plain))[-1]
    assert "log" in table.title and [row[1] for row in table.rows[:2]] == ["+25.0%", "+9.4%"]


def test_runs_that_cannot_be_compared_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OtherRunError, match=r"it has a log; give a run made with log\.enabled=false"):
        tables([read_costs(run)], read_costs(run))
    other = make_run(
        tmp_path / "other", usual_lines(log=False), log={"enabled": False}, pilot={"batch_size": 32, "dtype": "fp32"}
    )
    with pytest.raises(OtherRunError, match=r"other cannot be compared: .*pilot\.batch_size 16 and 32"):
        tables([read_costs(run)], read_costs(other))


def test_the_command_prints_tables_and_writes_a_page(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = tc_ray("report", run, "--out", page)
    assert shown.returncode == 0, shown.stderr
    for text in (
        "Pilot: rounds",
        "21%",
        "rounds/s consumable",
        "0.333",
        "pilot-0",
        "2.0 GB",
        "the Copilot is the bottleneck",
    ):
        assert text in shown.stdout, text
    html = page.read_text()
    assert html.count("<svg") == 4 and "http" not in re.sub(r"http-equiv", "", html)
    two = tc_ray("report", run, run)
    assert two.stdout.count("trial") >= 10


def test_a_page_is_bounded_however_long_the_run() -> None:
    long = Curve(np.arange(100_000, dtype=float), np.arange(100_000, dtype=float) % 1000)
    few = binned(long, largest=True)
    assert len(few.x) == MOST_POINTS and few.y.max() == 999 and few.x[-1] == 99_999
    assert binned(long).y.mean() == pytest.approx(long.y.mean())


def test_peak_memory_is_of_this_process_and_grows() -> None:
    before = peak_memory("me")["me"]
    held = np.ones(60_000_000 // 8)
    assert peak_memory("me")["me"] >= before and held.nbytes == 60_000_000
    assert 1e7 < before < 1e12
