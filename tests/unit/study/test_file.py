"""STUDY.yaml: what is refused, and that each refusal names file, line and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tc_ray.config.yaml_file import ConfigError
from tc_ray.study.file import load_study
from tests.support.study_samples import tiny_study, write_study

REPOSITORY = Path(__file__).resolve().parents[3]


def test_a_cells_settings_are_the_recipes_then_the_tasks_then_the_variants(tmp_path: Path) -> None:
    study = tiny_study(
        tmp_path,
        tasks={"sums": {"pilot.max_rounds": 4, "copilot": {"steps_per_round": 5}}},
        variants={"copilot": {}, "few": {"pilot": {"lora": {"rank": 3}}, "copilot.steps_per_round": 1}},
    )
    config = study.config("sums", 2, "few")
    assert (config.pilot.max_rounds, config.copilot.steps_per_round, config.pilot.lora.rank) == (4, 1, 3)
    assert config.pilot.batch_size == 8, "the recipe's other fields of a section stay"
    assert (config.run.seed, config.data_seed) == (2, 1), "all seeds are measured on the same rows"
    assert config.model.pilot == str(tmp_path / "model"), "paths start at the recipe's folder too"


def test_a_preset_replaces_what_is_below_it_alone(tmp_path: Path) -> None:
    """Fields of the recipe and of the task give way to it; those beside it in the variant stay."""
    write_study(tmp_path)
    recipe = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    recipe["copilot"] |= {"start_row": "learned", "memory_norm": True}
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(recipe))
    study = tiny_study(
        tmp_path,
        recipe="saved.yaml",
        tasks={"sums": {"copilot.error_input": "embedding"}},
        variants={"copilot": {}, "paper": {"copilot": {"memory_norm": True, "preset": "paper"}}},
    )
    plain, paper = study.config("sums", 1, "copilot").copilot, study.config("sums", 1, "paper").copilot
    assert (plain.preset, plain.start_row, plain.error_input) == (None, "learned", "embedding")
    assert (paper.start_row, paper.error_input, paper.memory_norm) == ("zeros", "free", True)
    assert (paper.steps_per_round, paper.layers) == (plain.steps_per_round, plain.layers)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"variant": {}}, r"STUDY\.yaml, line \d+: variant: unknown key; did you mean variants\?"),
    ({"seeds": []}, r"STUDY\.yaml, line \d+: seeds: .*at least 1 item"),
    ({"seeds": [1, 1]}, r"seeds names a seed twice"),
    ({"variants": {"copilot": {"control": "longer"}}}, r"variants\.copilot comes first"),
    ({"variants": {"copilot": {}, "x": {"control": "long"}}}, r"control is 'long', not one of longer, wider"),
    (
        {"seeds": [1], "variants": {"copilot": {}, "both": {"control": "ensemble"}}},
        r"variants\.both: an ensemble joins the Pilots of two seeds",
    ),
    ({"variants": {"copilot": {}, "other": {"control": "transfer"}}}, r"transfer needs settings of the other Pilot"),
    ({"against": ["copilt"]}, r"against names 'copilt', which is no variant; did you mean copilot"),
    ({"tables": {"Scores": ["none"]}}, r"tables\.Scores names 'none'"),
    (
        {"tasks": {"sums": {"pilot.epoch": 2}}},
        r"STUDY\.yaml, line \d+: unknown key pilot\.epoch; did you mean pilot\.epochs",
    ),
    ({"variants": {"copilot": {"pilot": {"epochs": -1}}}}, r"STUDY\.yaml, line \d+: pilot\.epochs is -1"),
    ({"tasks": {"sums": {"run.seed": 3}}}, r"STUDY\.yaml, line \d+: run\.seed is set by the study"),
    ({"variants": {"copilot": {"log.enabled": False}}}, r"line \d+: the first variant needs a Copilot"),
    ({"variants": {"copilot": {}, "w": {"control": "wider"}}}, r"line \d+: wider raises the LoRA rank"),
    ({"tasks": {"sums": {"log.path": "elsewhere"}}}, r"STUDY\.yaml: log\.path is elsewhere: each cell keeps its log"),
    ({"variants": {"copilot": {}, "x": {"control": ["longer"]}}}, r"control is \['longer'\], not one of longer"),
    ({"tasks": {"sums": {"log.keep_rounds": 200}}}, r"each cell keeps its whole log"),
    ({"variants": {"copilot": {}, "x": {"log.full_policy": "drop"}}}, r"each cell keeps its whole log"),
    (
        {"tasks": {"sums": {"data.train": "no.jsonl", "data.fallback": "embedded"}}},
        r"task sums, variant copilot: data\.train is no\.jsonl: no such file",
    ),
    (
        {"tasks": {"sums": {"data.test": {"a": "STUDY.yaml", "b": "STUDY.yaml"}}}},
        r"data\.test has the sets a, b: in a study give each a task of its own",
    ),
    ({"recipe": "absent"}, r"neither a file here nor a recipe"),
    ({"tasks": {"a/b": {}}}, r"STUDY\.yaml, line \d+: tasks\.a/b: .*pattern"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_refusals_name_the_place(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = write_study(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        load_study(file)


def test_the_line_is_the_one_of_the_field(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    text = yaml.safe_dump({**yaml.safe_load(file.read_text()), "tasks": {"sums": {"fusion.lam_grid": [0.5]}}})
    file.write_text(text)
    line = next(number for number, row in enumerate(text.splitlines(), 1) if "lam_grid" in row)
    with pytest.raises(ConfigError, match=rf"STUDY\.yaml, line {line}: fusion: lam_grid must contain 0\.0"):
        load_study(file)


def test_no_variants_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "STUDY.yaml"
    file.write_text("name: x\nrecipe: demo\nseeds: [1]\ntasks: {a: }\n")
    with pytest.raises(ConfigError, match=r"STUDY\.yaml: variants: is missing \(lines: settings of each variant"):
        load_study(file)


def test_results_are_beside_the_file_or_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its recipe and its data are; else all cells would run again without a word."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "kept").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    study = tiny_study(tmp_path, results="kept")
    assert study.result_folders[0].resolve() == tmp_path / "here" / "kept"
    (tmp_path / "kept").mkdir()
    assert study.result_folders[0] == tmp_path / "kept"


@pytest.mark.parametrize("name", ["controls", "ablations"])
def test_the_studies_that_come_with_tc_ray_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In a clone beside data files of the names that their recipe and tasks use."""
    for file in ("svamp/train.jsonl", "svamp/test.jsonl", "obqa/train.jsonl", "obqa/test.jsonl"):
        (tmp_path / "shared" / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shared" / "data" / file).write_text("")
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path / "clone")
    study = load_study(REPOSITORY / "jobs" / "studies" / f"{name}.yaml")
    for task in study.file.tasks:
        config = study.config(task, 1, "copilot")
        assert (config.pilot.dtype, config.copilot.dtype) == ("fp32", "fp32"), (
            "keys of results must not depend on machines"
        )
