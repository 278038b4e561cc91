"""What `longer` and `wider` raise, what a cell keeps of its settings, and whose models go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tc_ray.data.prepared.batches import RoundOrder
from tc_ray.models.schedule import rate_factor
from tc_ray.study import work
from tc_ray.study.cells import Cell, cells_of, placed
from tc_ray.study.results import Model, Result, find_result
from tc_ray.study.schedule import _Runs, folder_of
from tc_ray.study.work import Costs, Done, do_cell, raised
from tests.support.study_samples import answers, made_up, random_results, tiny_study


def control(folder: Path, name: str, **settings: object) -> Cell:
    tasks = {"sums": {"pilot.method": "lora", "pilot.lora.rank": 4, "pilot.lora.alpha": 8, **settings}}
    study = tiny_study(folder, seeds=[1], tasks=tasks, variants={"copilot": {}, name: {"control": name}})
    return list(cells_of(study).by_key.values())[1]


def result(cell: Cell, *, rounds: int, copilot_seconds: float, copilot_parameters: int = 0) -> Result:
    made = made_up(cell, {}, pilot=100.0, copilot=copilot_seconds)
    return Result(**{**vars(made), "rounds": rounds, "copilot_parameters": copilot_parameters})


@pytest.mark.parametrize("share", [0.06, 0.36, 1.0, 2.4])
def test_longer_has_rounds_and_rows_for_the_copilots_compute(tmp_path: Path, share: float) -> None:
    cell = control(tmp_path, "longer", **{"pilot.max_rounds": None})
    rows, batch = 96, cell.config.pilot.batch_size
    rounds = RoundOrder(rows, batch, 2, 1).rounds
    config = raised(cell, cell.config, result(cell, rounds=rounds, copilot_seconds=100 * share))
    wanted = -int(-rounds * (1 + share) // 1)  # a control never has less compute
    order = RoundOrder(rows, batch, config.pilot.epochs, 1)
    assert min(order.rounds, config.pilot.max_rounds or 0) == wanted
    assert not config.log.enabled
    # its first rounds train on the same rows as the Pilot it is held against, at another rate
    base = RoundOrder(rows, batch, 2, 1)
    assert all((order.sample_rows(r) == base.sample_rows(r)).all() for r in range(1, rounds + 1))
    assert rate_factor(rounds - 1, steps=wanted, warmup_ratio=0.03, schedule="cosine") > rate_factor(
        rounds - 1, steps=rounds, warmup_ratio=0.03, schedule="cosine"
    )


def test_wider_keeps_the_scale_of_the_adapters(tmp_path: Path) -> None:
    cell = control(tmp_path, "wider")
    # 1,000 parameters at rank 4 are 250 a rank; 2,600 more are rank 14.4
    config = raised(cell, cell.config, result(cell, rounds=10, copilot_seconds=1, copilot_parameters=2600))
    assert (config.pilot.lora.rank, config.pilot.lora.alpha) == (14, 28)
    assert cell.config.pilot.lora.rank == 4, "the cell's own settings, and so its key, stay"


def test_a_result_names_the_settings_that_ran_and_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n')
    cell = control(tmp_path, "longer", **{"data.test": {"mine": {"file": str(tmp_path / "rows.jsonl")}}})
    base = result(cell, rounds=10, copilot_seconds=50)
    ran = []

    def pretended(job: work.Work) -> work.Made:
        ran.append(job.config.pilot.max_rounds)
        return {"pilot": Model({"test": answers([True])})}, Costs(1.0, 0.0, 15, 1, 0)

    monkeypatch.setitem(work.KINDS, "longer", pretended)
    needs = (Done(tmp_path, base),)
    made = do_cell(cell, placed(cell, tmp_path / "cell", None, None), needs, tmp_path / "results", "tc-ray study")
    assert ran == [15] and made.settings["pilot.max_rounds"] == 15
    assert str(tmp_path) not in (tmp_path / "results" / f"{cell.key}.json").read_text()


def test_a_cell_that_runs_again_for_its_models_leaves_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`longer` and others were made from it; a second measurement of seconds differs."""
    cell = control(tmp_path, "longer").needs[0]
    first = made_up(cell, {})
    first.save(tmp_path / "results")
    monkeypatch.setitem(work.KINDS, "run", lambda _: ({}, Costs(7.0, 7.0, 7, 7, 7)))
    do_cell(cell, placed(cell, tmp_path / "cell", None, None), (), tmp_path / "results", "")
    assert find_result(cell.key, [tmp_path / "results"]) == first


def test_models_that_a_failed_cell_needs_stay(tmp_path: Path) -> None:
    """The same command tries it again, and would train its host again."""
    study = tiny_study(tmp_path, seeds=[1], variants={"copilot": {}, "late": {"copilot.pattern": "late"}})
    cells = cells_of(study)
    host, late = cells.by_key.values()
    results = random_results(cells, rows=2)
    weights = folder_of(study, host) / "pilot"
    weights.mkdir(parents=True)
    runs = _Runs(study, cells, {host.key: results[host.key]}, [late], None)  # type: ignore[arg-type]
    runs._left.clear()  # it was started and has failed
    runs._remove_models()
    assert weights.exists()
    runs._again.clear()  # it has ended
    runs._remove_models()
    assert not weights.exists()
