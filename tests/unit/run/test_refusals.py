"""What a resume may change stands on each field: the others are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tc_ray.config.load import load_config, save_config
from tc_ray.run.state import JobError, check_resume

FIRST = ["log.storage_options.aws_region=here", "data.embedded_task_options.max_terms=3"]


@pytest.mark.parametrize(
    "changes",
    [
        ["resources.pilot_threads=2", "log.keep_rounds=500", "pilot.max_failures=0"],
        ["fusion.lam_grid=[0.0, 0.2]", "tracking.enabled=false"],
        ["resources.pilot_workers=2", "pilot.micro_batch_size=8", "pilot.zero_stage=3", "resources.copilot_workers=4"],
        ["resources.pilot_workers=4", "resources.pilot_min_workers=2", "pilot.micro_batch_size=4"],
    ],
    ids=["fields", "whole sections", "division", "fewest workers"],
)
def test_marked_fields_may_change(tmp_path: Path, changes: list[str]) -> None:
    save_config(load_config(None, FIRST), tmp_path / "config.yaml")
    check_resume(load_config(None, ["log.storage_options.aws_region=there", FIRST[1], *changes]), tmp_path)


def test_other_fields_are_refused_by_name(tmp_path: Path) -> None:
    save_config(load_config(None, FIRST), tmp_path / "config.yaml")
    other = load_config(None, [FIRST[0], "data.embedded_task_options.max_terms=4", "run.seed=1"])
    with pytest.raises(JobError, match=r"run\.seed: 17 -> 1; data\.embedded_task_options: .*3.* -> .*4") as refused:
        check_resume(other, tmp_path)
    assert "pilot" not in str(refused.value)


def test_a_folder_without_a_run_is_free(tmp_path: Path) -> None:
    check_resume(load_config(None, []), tmp_path)
