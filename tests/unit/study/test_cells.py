"""The graph of cells: what is shared, and what a key follows from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.yaml_file import ConfigError
from tc_ray.study.cells import Cells, Place, cells_of, content
from tc_ray.study.schedule import left_to_run, results_of
from tests.support.study_samples import random_results, tiny_study

LORA = {"pilot.method": "lora", "pilot.lora.target_modules": ["q_proj"]}


def graph(folder: Path, **changes: Any) -> Cells:
    return cells_of(tiny_study(folder, **changes))


def kinds(cells: Cells) -> dict[str, int]:
    found = [cell.kind for cell in cells.by_key.values()]
    return {kind: found.count(kind) for kind in dict.fromkeys(found)}


def test_one_pilot_and_one_log_serve_every_copilot(tmp_path: Path) -> None:
    variants = {
        "copilot": {},
        "fewer-steps": {"copilot.steps_per_round": 1},
        "late": {"copilot.pattern": "late"},
        "logits": {"fusion.space": "logits"},
        "twice": {"copilot.pattern": "late"},
        "other": {"pilot.learning_rate": 0.01},
        "alone": {"log.enabled": False},
    }
    cells = graph(tmp_path, seeds=[1], variants=variants)
    # a Pilot for `copilot`, one for `other`, one without a log; the two `late` are one cell
    assert kinds(cells) == {"run": 3, "copilot": 2, "fusion": 1}
    host = cells.shown[Place("copilot", "sums", 1)][0]
    for name in ("late", "fewer-steps", "logits"):
        assert [need.key for need in cells.shown[Place(name, "sums", 1)][0].needs] == [host.key]
    assert cells.shown[Place("twice", "sums", 1)] == cells.shown[Place("late", "sums", 1)]
    # the Pilot alone has one line for each training of it
    assert [line for line in cells.lines if line.endswith("/pilot")] == ["copilot/pilot", "other/pilot"]
    assert cells.shown[Place("alone", "sums", 1)][1] == "pilot"


def test_pooling_variants_share_a_log_of_all_layers_only(tmp_path: Path) -> None:
    variants = {"copilot": {}, "max": {"log.pooling": "max"}}
    assert kinds(graph(tmp_path, seeds=[1], variants=variants)) == {"run": 2}
    shared = graph(tmp_path, seeds=[1], variants=variants, tasks={"sums": {"log.rationale": "all"}})
    assert kinds(shared) == {"run": 1, "copilot": 1}


def test_the_paper_s_copilot_shares_a_log_whose_settings_are_given(tmp_path: Path) -> None:
    """With full fine-tuning the preset would have X~ in the log, and any preset more errors."""
    variants = {"copilot": {}, "paper": {"copilot.preset": "paper"}}
    assert kinds(graph(tmp_path, seeds=[1], variants=variants)) == {"run": 2}
    shared = graph(tmp_path, seeds=[1], variants=variants, tasks={"sums": {"log.question": "ids", "log.top_k": 8}})
    assert kinds(shared) == {"run": 1, "copilot": 1}


def test_controls_need_the_runs_of_the_first_variant(tmp_path: Path) -> None:
    names = ("longer", "wider", "ensemble", "temperature", "latest")
    variants = {"copilot": {}, **{name: {"control": name} for name in names}}
    variants["transfer"] = {"control": "transfer", "pilot.learning_rate": 0.01}
    cells = graph(tmp_path, tasks={"sums": LORA}, variants=variants)
    assert kinds(cells) == {"run": 4, **dict.fromkeys([*names, "transfer"], 2)}
    hosts = {seed: cells.shown[Place("copilot", "sums", seed)][0].key for seed in (1, 2)}
    for name in names:
        first, *others = cells.shown[Place(name, "sums", 1)][0].needs
        assert first.key == hosts[1]
        assert [need.key for need in others] == ([hosts[2]] if name == "ensemble" else [])
    assert [need.key for need in cells.shown[Place("ensemble", "sums", 2)][0].needs] == [hosts[2], hosts[1]]
    pilot, host = cells.shown[Place("transfer", "sums", 1)][0].needs
    assert host.key == hosts[1] and not pilot.config.log.enabled and pilot.config.pilot.learning_rate == 0.01
    keys = list(cells.by_key)
    assert all(keys.index(need.key) < keys.index(cell.key) for cell in cells.by_key.values() for need in cell.needs)


@pytest.mark.parametrize(
    ("control", "settings", "idle"),
    [
        ("ensemble", {"pilot.epochs": 3}, "pilot.epochs"),
        ("temperature", {"fusion.max_test_rows": 2}, "fusion.max_test_rows"),
        ("latest", {"log.pooling": "max"}, "log.pooling"),
        ("longer", {"copilot.steps_per_round": 9}, "copilot.steps_per_round"),
        ("transfer", {"pilot.learning_rate": 0.01, "copilot.pattern": "late"}, "copilot.pattern"),
    ],
)
def test_settings_that_a_control_cannot_take_are_refused(
    tmp_path: Path, control: str, settings: dict[str, Any], idle: str
) -> None:
    """The report would say that they were there."""
    with pytest.raises(ConfigError, match=rf"STUDY\.yaml, line \d+: variants\.x: {idle}: without effect, as {control}"):
        graph(tmp_path, variants={"copilot": {}, "x": {"control": control, **settings}})


def test_settings_that_a_control_takes_are_not(tmp_path: Path) -> None:
    variants = {
        "copilot": {},
        "latest": {"control": "latest", "copilot.pattern": "late", "fusion.space": "logits"},
        "ensemble": {"control": "ensemble", "fusion.max_new_tokens": 9},
        "longer": {"control": "longer", "pilot.learning_rate": 0.01},
    }
    assert kinds(graph(tmp_path, variants=variants)) == {"run": 2, "latest": 2, "ensemble": 2, "longer": 2}


def test_a_temperature_is_refused_where_beams_answer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="temperature keeps the Pilot's greedy answers"):
        graph(
            tmp_path,
            tasks={"sums": {"fusion.num_beams": 3}},
            variants={"copilot": {}, "x": {"control": "temperature"}},
        )


def test_a_model_s_folder_may_have_any_name(tmp_path: Path) -> None:
    """Two models in folders of one name up to the last `@` are two models."""
    config = tiny_study(tmp_path).config("sums", 1, "copilot")
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number) / "llama@v2"
        shutil.copytree(tmp_path / "model", folder)
        if number == 2:
            (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
        config.model.pilot = str(folder)
        found.append(content(config)["model.pilot"])
    assert found[0] != found[1]


def test_a_key_follows_from_content_not_from_places(tmp_path: Path) -> None:
    """The same study in another folder, with its data and model copied, has the same keys; other rows give others."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    data = tmp_path / "one" / "rows.jsonl"
    data.write_text('{"prompt": "1+1", "completion": "2"}\n')
    tasks = {"sums": {"data.train": "rows.jsonl"}}
    one = graph(tmp_path / "one", tasks=tasks)
    shutil.copytree(tmp_path / "one" / "model", tmp_path / "two" / "model")
    shutil.copy(data, tmp_path / "two" / "rows.jsonl")
    assert set(graph(tmp_path / "two", tasks=tasks, name="renamed").by_key) == set(one.by_key)
    (tmp_path / "two" / "rows.jsonl").write_text('{"prompt": "1+1", "completion": "3"}\n')
    other = tmp_path / "three"
    shutil.copytree(tmp_path / "two", other)  # contents of a file are read once in a process
    assert not set(graph(other, tasks=tasks).by_key) & set(one.by_key)


def test_what_cannot_change_a_result_is_in_no_key(tmp_path: Path) -> None:
    config = tiny_study(tmp_path).config("sums", 1, "copilot")
    changed = config.model_copy(deep=True)
    changed.resources.pilot_threads = changed.resources.copilot_cpus = 3
    changed.tracking.enabled, changed.log.compression = True, "zstd"
    changed.run.name, changed.run.folder = "other", tmp_path
    assert content(changed) == content(config)
    changed.fusion.max_new_tokens += 1  # it may change on resume, and changes the answers
    assert content(changed) != content(config)


def test_only_what_has_no_result_is_run_and_what_its_models_come_from(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, seeds=[1], variants={"copilot": {}, "late": {"copilot.pattern": "late"}})
    cells = cells_of(study)
    assert [cell.kind for cell in left_to_run(study, cells, {})] == ["run", "copilot"]
    found = random_results(cells, rows=5)
    host, late = cells.by_key.values()
    # from a fresh machine's point of view: results without models
    found[host.key].save(study.folder / "results")
    assert results_of(study, cells).keys() == {host.key}
    assert [cell.key for cell in left_to_run(study, cells, results_of(study, cells))] == [host.key, late.key]
    found[late.key].save(study.folder / "results")
    assert left_to_run(study, cells, results_of(study, cells)) == []


def test_longer_needs_the_result_alone(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, seeds=[1], variants={"copilot": {}, "longer": {"control": "longer"}})
    cells = cells_of(study)
    host, longer = cells.by_key.values()
    results = {host.key: random_results(cells, rows=5)[host.key]}
    assert [cell.key for cell in left_to_run(study, cells, results)] == [longer.key]


def test_a_fresh_machine_starts_from_the_results_of_another(tmp_path: Path) -> None:
    variants = {"copilot": {}, "late": {"copilot.pattern": "late"}}
    cells = cells_of(tiny_study(tmp_path, seeds=[1], variants=variants))
    host, late = cells.by_key
    committed = random_results(cells, rows=5)
    for result in committed.values():
        result.save(tmp_path / "committed")
    fresh = tiny_study(tmp_path, seeds=[1], variants=variants, results="committed", folder=str(tmp_path / "new"))
    assert left_to_run(fresh, cells_of(fresh), results_of(fresh, cells_of(fresh))) == []
    # and they go before what is measured here, so that the report does not change
    random_results(cells, rows=6)[host].save(fresh.result_folders[-1])
    assert results_of(fresh, cells_of(fresh)) == committed
    # a new variant needs the models of a cell whose result alone is there
    more = tiny_study(
        tmp_path, seeds=[1], variants={**variants, "early": {"copilot.pattern": "early"}}, results="committed"
    )
    left = left_to_run(more, cells_of(more), results_of(more, cells_of(more)))
    assert [cell.kind for cell in left] == ["run", "copilot"] and left[0].key == host and left[1].key != late
