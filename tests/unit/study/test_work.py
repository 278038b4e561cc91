"""What `longer` and `wider` raise, and the cut of the data that all seeds share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tc_ray.data.prepared.batches import RoundOrder
from tc_ray.pilot.engine import cosine_with_warmup
from tc_ray.study.cells import Cell, cells_of
from tc_ray.study.results import Result
from tc_ray.study.work import raised
from tests.support.study_samples import made_up, tiny_study


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
    wanted = int(rounds * (1 + share))
    order = RoundOrder(rows, batch, config.pilot.epochs, 1)
    assert min(order.rounds, config.pilot.max_rounds or 0) == wanted
    assert not config.log.enabled
    # its first rounds train on the same rows as the Pilot it is held against, at another rate
    base = RoundOrder(rows, batch, 2, 1)
    assert all((order.sample_rows(r) == base.sample_rows(r)).all() for r in range(1, rounds + 1))
    assert cosine_with_warmup(rounds - 1, rounds=wanted, warmup_ratio=0.03) > cosine_with_warmup(
        rounds - 1, rounds=rounds, warmup_ratio=0.03
    )


def test_wider_keeps_the_scale_of_the_adapters(tmp_path: Path) -> None:
    cell = control(tmp_path, "wider")
    # 1,000 parameters at rank 4 are 250 a rank; 2,600 more are rank 14.4
    config = raised(cell, cell.config, result(cell, rounds=10, copilot_seconds=1, copilot_parameters=2600))
    assert (config.pilot.lora.rank, config.pilot.lora.alpha) == (14, 28)
    assert cell.config.pilot.lora.rank == 4, "the cell's own settings, and so its key, stay"
