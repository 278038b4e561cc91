"""The schedule over a real Ray with cells that only pretend: order, room, failures, what is done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tc_ray.cluster.capacity import Need
from tc_ray.config.schema import RunConfig
from tc_ray.study import work
from tc_ray.study.cells import Cell, Cells, cells_of
from tc_ray.study.file import Study
from tc_ray.study.results import Model, Result
from tc_ray.study.schedule import StudyError, fit, run_study
from tests.support.local_ray import local_ray
from tests.support.study_samples import answers, made_up, read_rows, tiny_study

cluster = local_ray(cpus=4)
VARIANTS = {"copilot": {}, "late": {"copilot.pattern": "late"}, "longer": {"control": "longer"}}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return tiny_study(tmp_path, tasks={"sums": {}, "long": {"data.embedded_rows": 130}}, variants=VARIANTS)


def pretender(log: Path, fails: str = "") -> Callable[..., Result]:
    """A `do_cell` that notes when it begins and ends, and fails for cells whose name begins with `fails`."""
    models = {
        name: Model({"test": answers([True, False])}, 0.5 if name == "fused" else None) for name in ("pilot", "fused")
    }

    def do(cell: Cell, config: RunConfig, needs: Any, results: Path, *_: Any) -> Result:
        def note(what: str) -> None:
            with log.open("a") as file:
                file.write(json.dumps({"cell": cell.name, "what": what}) + "\n")

        note("begin")
        time.sleep(0.3)
        if fails and cell.name.startswith(fails):
            raise RuntimeError("no luck")
        result = made_up(cell, models)
        result.save(results)
        note("end")
        return result

    return do


@pytest.mark.slow
def test_cells_begin_after_what_they_need_and_as_many_as_fit(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = cells_of(study)
    monkeypatch.setattr(work, "do_cell", pretender(tmp_path / "log.jsonl"))
    assert run_study(study, cells).keys() == cells.by_key.keys()
    events = read_rows(tmp_path / "log.jsonl")
    ended: set[str] = set()
    running: list[str] = []
    most = 0
    needs = {cell.name: {cells.by_key[need.key].name for need in cell.needs} for cell in cells.by_key.values()}
    for event in events:
        if event["what"] == "begin":
            assert needs[event["cell"]] <= ended
            running.append(event["cell"])
        else:
            running.remove(event["cell"])
            ended.add(event["cell"])
        most = max(most, sum(needs_cpus(cells, name) for name in running))
    assert ended == set(needs)
    assert 2 < most <= 4, "more than one cell at once, and no more than the CPUs hold"


def needs_cpus(cells: Cells, name: str) -> int:
    cell = next(cell for cell in cells.by_key.values() if cell.name == name)
    return 2 if cell.kind == "run" else 1  # Pilot and Copilot; a Pilot or a task alone


@pytest.mark.slow
def test_a_failed_cell_takes_down_those_that_need_it_and_is_tried_again(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = cells_of(study)
    monkeypatch.setattr(work, "do_cell", pretender(tmp_path / "first.jsonl", fails="sums/copilot/1"))
    with pytest.raises(StudyError) as caught:
        run_study(study, cells)
    text = str(caught.value)
    assert "sums/copilot/1: RuntimeError: no luck" in text
    assert "sums/late/1: it needs sums/copilot/1" in text and "sums/longer/1: it needs sums/copilot/1" in text
    assert text.startswith(f"3 of {len(cells.by_key)} cells have no result")
    monkeypatch.setattr(work, "do_cell", pretender(tmp_path / "second.jsonl"))
    run_study(study, cells)
    again = {event["cell"] for event in read_rows(tmp_path / "second.jsonl")}
    # `late` needs models that the pretended cells never left, so both of its hosts run again for them
    assert {"sums/copilot/1", "sums/late/1", "sums/longer/1"} == again


def test_room_is_counted_by_node() -> None:
    def needs(count: int, cpus: float, gpus: float = 0.0) -> Need:
        return Need("worker", count, {"CPU": cpus} | ({"GPU": gpus} if gpus else {}), ())

    nodes = [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert fit(nodes, [needs(2, 3), needs(2, 1)])
    assert not fit(nodes, [needs(3, 3)]), "8 CPUs are there, but no node has 3 left for the third"
    assert fit(nodes, [needs(1, 1, 1.0), needs(1, 4), needs(1, 3)])
    assert not fit(nodes, [needs(2, 1, 1.0)])
    assert fit(nodes, [needs(2, 1, 0.5)]) and not fit(nodes, [needs(2, 1, 0.6)])
    assert not fit([{"CPU": 4.0, "GPU": 2.0}], [needs(3, 1, 0.6)]), "1.8 of 2 GPUs, but two of them share no GPU"
    assert nodes == [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 1.0}]
