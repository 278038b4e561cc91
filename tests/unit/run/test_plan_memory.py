"""The plan's peak memory: of the paper's recipes on described nodes, and of what cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tc_ray.config.load import load_config
from tc_ray.run.plan.memory import pilot_states, processes
from tc_ray.run.plan.nodes import Node, described, this_machine
from tc_ray.run.plan.plan import Plan, make_plan
from tests.support.command_line import tc_ray
from tests.unit.run.test_paper_recipes import RECIPES, stand_in

GB = 10**9


def plan_of(recipe: Path, folder: Path, nodes: list[Node], *overrides: str) -> Plan:
    named = load_config(recipe).model
    assert named.copilot is not None
    places = [f"model.pilot={stand_in(named.pilot, folder)}", f"model.copilot={stand_in(named.copilot, folder)}"]
    # a token a byte here: rows are longer than the cut-off of the recipes
    lengths = ["data.cutoff_tokens=2000", f"run.folder={folder / 'run'}"]
    return make_plan(load_config(recipe, [*places, *lengths, *overrides]), nodes)


def about_memory(texts: list[str]) -> list[str]:
    return [text for text in texts if " needs " in text and " GB" in text]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_papers_recipes_fit_into_eight_gpus_of_80_gb(recipe: Path, tmp_path: Path) -> None:
    plan = plan_of(recipe, tmp_path, described("8x80+1000"))
    assert not about_memory(plan.refusals), plan.refusals
    assert not [text for text in plan.refusals if "asks for" in text]
    who = {process.who for process in plan.memory}
    assert who == {
        *("Pilot worker", "Pilot worker at its export", "Copilot learner"),
        *("evaluation worker", "replica of the server"),
    }
    assert plan.sizes is not None and plan.log_bytes_per_round is not None
    real = load_config(recipe)
    found = processes(real, plan.sizes, round_bytes=plan.log_bytes_per_round, rounds=plan.rounds)
    assert all(GB < process.kept <= process.kept + process.passing < 80 * GB for process in found)
    assert "memory     " in str(plan) and "of a GPU" in str(plan)


def recipe_of(name: str) -> Path:
    return next(recipe for recipe in RECIPES if name in recipe.stem)


def test_what_cannot_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    """16 GB of weights on each of four GPUs of 16 GB; ZeRO-3 over eight leaves 2 GB each, and 2 GB that are gathered."""
    plan = plan_of(recipe_of("8b"), tmp_path, described("8x16"))
    [text] = [text for text in about_memory(plan.refusals) if text.startswith("a Pilot worker needs")]
    assert "of GPU memory at least, and there are 16.0 GB" in text
    assert "pilot.zero_stage=3 with resources.pilot_workers=4 needs" in text and text.endswith(" GB each")
    stage3 = plan_of(recipe_of("8b"), tmp_path, described("8x16"), "pilot.zero_stage=3")
    assert not [text for text in about_memory(stage3.refusals) if text.startswith("a Pilot worker needs")]


def test_all_weights_of_8b_need_more_workers(tmp_path: Path) -> None:
    full = ["pilot.method=full", "log.question=ids", "resources.pilot_workers=1", "pilot.zero_stage=0"]
    plan = plan_of(recipe_of("8b"), tmp_path, described("8x80"), *full)
    [text] = [text for text in about_memory(plan.refusals) if text.startswith("a Pilot worker needs")]
    assert "with resources.pilot_workers=3 needs" in text
    one = plan_of(recipe_of("8b"), tmp_path, described("1x80"), *full, "pilot.batch_size=4")
    assert any("No zero_stage with up to 1 workers fits: pilot.method=lora needs less" in t for t in one.refusals)


def test_ram_of_the_nodes_counts_too(tmp_path: Path) -> None:
    small = plan_of(recipe_of("8b"), tmp_path, described("8x80+12"))
    assert any(text.startswith("training needs") and "there are 12.0 GB" in text for text in small.refusals)
    assert any("training may need" in text for text in plan_of(recipe_of("8b"), tmp_path, described("8x80+60")).notes)
    assert any(
        "asks for 5 GPUs, the nodes have 4" in t for t in plan_of(recipe_of("8b"), tmp_path, described("4x80")).refusals
    )


def test_states_of_a_worker() -> None:
    """The sums of the ZeRO paper's table, for AdamW with a master copy: 16 bytes a number, and DeepSpeed's fp32 gradients."""
    million = 10**6
    assert pilot_states(million, million, 4, stage=0, workers=1, gpu=False) == (4 + 4 + 8) * million
    assert pilot_states(million, million, 2, stage=1, workers=4, gpu=False) == (2 + 2 + 2) * million + 16 * million // 4
    split = pilot_states(million, million, 2, stage=3, workers=4, gpu=False)
    assert split == 2 * million // 4 + 2 * million + 2 * million // 4 + 16 * million // 4 + 2 * million
    frozen = pilot_states(million, 0, 2, stage=2, workers=4, gpu=False)
    assert frozen == 2 * million


def test_nodes_in_words() -> None:
    assert described("8x80") == [Node(None, 8, 80 * GB)]
    assert described("2 x 4 x 24 + 512") == [Node(512 * GB, 4, 24 * GB)] * 2
    for text in ("8", "8x", "x80", "8x80GB"):
        with pytest.raises(ValueError, match="NODESxGPUSxGB"):
            described(text)
    here = this_machine()
    assert here.memory is not None and here.memory > GB


def test_the_command_takes_described_nodes() -> None:
    refused = tc_ray("train", "demo", "--on", "8x80")
    assert refused.returncode == 2 and "--plan" in refused.stderr
